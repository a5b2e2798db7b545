"""The pictures of docs/desk.md: the desk on the demo's runs, in a headless Chromium.

    make demo
    tiltflow evaluate --model packaged:pipeline --few-step runs/demo/tilt/export/few_step \\
        --tilt-lora runs/demo/tilt/export/tilt --suite shapes --count 96 --autocast auto \\
        --batch 32 --keep-images --json runs/demo/looked_at/evaluation.json
    python scripts/desk_figures.py runs/demo runs/demo/looked_at/evaluation.json

The votes of the last picture are those of the loop's simulated person, and go to a file that is
deleted. `--only NAME` makes one of them.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from tiltflow.desk.app import Desk, make_app
from tiltflow.desk.serve import LIMITS
from tiltflow.rewards.remote.gate import make_server
from tiltflow.rewards.worlds.shapes_checker import caption_from_text
from tiltflow.rewards.worlds.shapes_taste import liking
from tiltflow.tasks.reward_server import bound

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
TOKEN = "figures"
VOTES = 40
SIZES = {"runs": (1280, 1180), "compare": (1100, 900), "dial": (1100, 760), "vote": (1000, 900)}


def runs(page: Any) -> None:
    """Every run ticked; what is watched beside the rewards is folded away, so that samples show."""
    for box in page.locator("#runs .list input").all():
        box.check()
    page.wait_for_selector(".tiles .pane")
    for group in ("Trained rewards", "Watch", "Losses", "Everything else"):
        fold = page.locator(f'details[data-group="{group}"]')
        if fold.count():
            fold.evaluate("fold => { fold.open = false; }")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.pane')].every(p => p.style.backgroundImage)"
    )


def compare(page: Any) -> None:
    page.get_by_label("Order").select_option("differ")
    page.wait_for_selector(".compare .picture img")


def dial(page: Any) -> None:
    page.get_by_role("button", name="Load the student").click()
    page.wait_for_function("() => document.querySelector('.made')?.naturalWidth > 0", timeout=90e3)
    page.get_by_role("button", name="Score all strengths").click()
    page.wait_for_function(
        "() => document.querySelectorAll('.plots .card:first-child circle').length === 7",
        timeout=600e3,  # a dot a strength
    )


def vote(page: Any) -> None:
    """The simulated person looks at both images of each pair, and presses a key."""
    for _ in range(VOTES):
        page.wait_for_function(
            "() => { const i = [...document.querySelectorAll('.sides img')];"
            " return i.length === 2 && i.every(i => i.complete); }"
        )
        prompt = page.locator(".ask").inner_text()
        sources = page.locator(".sides img").evaluate_all("all => all.map(i => i.src)")
        images = [Image.open(io.BytesIO(page.request.get(one).body())) for one in sources]
        left, right = (
            liking(np.asarray(image.convert("RGB")), caption_from_text(prompt)) for image in images
        )
        page.keyboard.press("1" if left > right else "2" if right > left else " ")
        page.wait_for_function(
            "old => document.querySelector('.sides img')?.src !== old", arg=sources[0]
        )
    page.locator("summary", has_text="What they say").click()
    page.wait_for_function("() => !document.getElementById('said').innerText")


VIEWS: dict[str, Callable[[Any], None]] = {
    "runs": runs,
    "compare": compare,
    "dial": dial,
    "vote": vote,
}


@contextmanager
def served(given: list[Path], votes: Path) -> Iterator[str]:
    """The desk's address, with its token."""
    sockets = bound("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    server = make_server(make_app(Desk(given, votes), "127.0.0.1", port, TOKEN), LIMITS)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/?token={TOKEN}"
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("given", nargs="+", type=Path, help="what `tiltflow desk` is given")
    parser.add_argument("--only", choices=VIEWS)
    parser.add_argument("--out", type=Path, default=FIGURES)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        with served(asked.given, Path(place) / "votes.jsonl") as address:
            for name in [asked.only] if asked.only else VIEWS:
                width, height = SIZES[name]
                page = browser.new_page(viewport={"width": width, "height": height})
                page.goto(f"{address}#{name}")
                page.wait_for_selector(f"#{name}:not([hidden]) > *")
                VIEWS[name](page)
                page.wait_for_load_state("networkidle")
                picture = Image.open(io.BytesIO(page.screenshot()))
                picture.convert("RGB").save(asked.out / f"desk_{name}.webp", quality=88, method=6)
                print(json.dumps({name: [width, height]}), flush=True)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
