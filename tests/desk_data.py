"""Runs and evaluations for the desk's tests, and the desk itself on a free port."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from students import random_like

from tiltflow.config.load import dump_config, load_config
from tiltflow.core.checkpoint import Checkpoint
from tiltflow.core.paths import resolve_path
from tiltflow.desk.app import Desk, make_app
from tiltflow.desk.serve import LIMITS
from tiltflow.models.families import load_backbone
from tiltflow.models.roles import AdapterSettings, adapter_roles
from tiltflow.rewards.remote.gate import make_server
from tiltflow.tasks.export import export_checkpoint
from tiltflow.tasks.reward_server import bound

TOKEN = "a-token-of-the-tests"
ODD = ("<img src=x onerror=alert(1)> & <b>bold</b>", "a \"quoted\" 'cat'", "قطة زرقاء تحت شجرة")
"""Prompts with markup, quotes and right-to-left text."""


def make_run(
    folder: Path,
    steps: int = 40,
    stage: str = "tilt",
    rate: float = 1e-4,
    prompts: Sequence[str] = (),
) -> Path:
    """A run's files; with `prompts`, its sheets are of so many samples, each of its own grey."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"stage: {stage}\ntrain:\n  steps: {steps}\n  generator_lr: {rate}\n"
        "rewards:\n  clipscore:\n    weight: 1.0\n"
        "watch:\n  rewards:\n    shapes:\n      weight: 1.0\n"
    )
    (folder / "samples").mkdir()
    for step in (0, steps):
        file = folder / "samples" / f"step-{step:06d}.png"
        if prompts:
            save_sheet(file, len(prompts))
            (file.parent / "prompts.txt").write_text("".join(f"{p}\n" for p in prompts))
        else:
            save_image(file, (step * 5, 90, 160), 64)
    add_lines(folder, range(0, steps + 1, 10))
    return folder


def add_lines(run: Path, steps: Sequence[int]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {
                "step": step,
                "generator/matching": 1 / (1 + step),
                "held_out/shapes": step / 100,
            }
            file.write(json.dumps(row) + "\n")


def save_sheet(path: Path, count: int, side: int = 16) -> None:
    """As a run's: eight columns, sample i of the grey 10 i."""
    greys = [10 * i if i < count else 255 for i in range(-(-count // 8) * 8)]
    pixels = np.array(greys, dtype=np.uint8).reshape(-1, 8).repeat(side, 0).repeat(side, 1)
    Image.fromarray(pixels).convert("RGB").save(path)


def save_image(path: Path, colour: tuple[int, int, int], side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


def make_evaluation(
    file: Path,
    scores: Mapping[str, Sequence[float]],
    prompts: Sequence[str],
    categories: Sequence[str] | None = None,
    seed: int = 0,
    images: bool = True,
) -> Path:
    """An evaluation.json of one reward, `shapes`, with its scores and images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(file.with_suffix(".images"), ignore_errors=True)
    systems = {
        name: {"nfe": 4, "scores": {"shapes": {"mean": float(np.mean(v)), "ci95": [0, 1]}}}
        for name, v in scores.items()
    }
    asked = {"prompts": "|".join(prompts), "seed": seed}
    file.write_text(json.dumps({"prompts": len(prompts), "systems": systems, "asked": asked}))
    rows = []
    for i, prompt in enumerate(prompts):
        row = {"prompt": prompt, "scores": {s: {"shapes": v[i]} for s, v in scores.items()}}
        rows.append(row | ({"category": categories[i]} if categories else {}))
        for k, system in enumerate(scores if images else ()):
            path = file.with_suffix(".images") / system / f"{i:05d}.png"
            save_image(path, (40 * k, 7 * i % 256, 120))
    file.with_suffix(".scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def add_sizes(file: Path, sizes: Sequence[str]) -> None:
    """Makes an evaluation one of several sizes: at the k-th its scores are k higher, and its images
    are of that size."""
    summary = json.loads(file.read_text())
    about = {
        system: {"shapes": {"mean": values["scores"]["shapes"]["mean"], "ci95": [0, 1]}}
        for system, values in summary["systems"].items()
    }
    summary["sizes"] = {s: {"prompts": summary["prompts"], "systems": about} for s in sizes}
    summary["asked"]["sizes"] = [[size, None] for size in sizes]
    file.write_text(json.dumps(summary))
    scores = file.with_suffix(".scores.jsonl")
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    for row in rows:
        row["sizes"] = {
            size: {s: {"shapes": v["shapes"] + k} for s, v in row["scores"].items()}
            for k, size in enumerate(sizes)
        }
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for system in file.with_suffix(".images").iterdir():
        for picture in sorted(system.glob("*.png")):
            with Image.open(picture) as image:
                for size in sizes:
                    height, width = map(int, size.split("x"))
                    (system / size).mkdir(exist_ok=True)
                    image.resize((width, height)).save(system / size / picture.name)
            picture.unlink()


def wait_for_pair(page: Any) -> None:
    """Until both images of a pair are there: before that the page takes no vote."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.sides img')].filter(i => i.complete).length === 2"
    )


class Client:
    """Requests to a desk, with any headers."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.headers = {"Cookie": f"tiltflow_desk_{port}={TOKEN}"}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        headers: Mapping[str, str | None] | None = None,
        body: object = None,
        method: str | None = None,
    ) -> tuple[HTTPResponse, bytes]:
        """The answer and its body; a header that is None is left out."""
        sent: dict[str, str | None] = dict(self.headers)
        if body is not None:
            sent |= {"Content-Type": "application/json", "Origin": self.address}
        sent |= headers or {}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        text = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        connection.request(
            method or ("GET" if body is None else "POST"),
            path,
            body=text,
            headers={k: v for k, v in sent.items() if v is not None},
        )
        response = connection.getresponse()
        return response, response.read()

    def json(self, path: str, body: object = None) -> dict:
        response, said = self.ask(path, body=body)
        assert response.status == 200, said
        return json.loads(said)


@contextmanager
def served(desk: Desk) -> Iterator[Client]:
    """The desk behind its gate, on a thread."""
    sockets = bound("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    server = make_server(make_app(desk, "127.0.0.1", port, TOKEN), LIMITS)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Client(port)
    finally:
        server.should_exit = True
        thread.join()


def make_tilts(
    folder: Path, count: int = 2, changes: Sequence[Sequence[str]] | None = None
) -> list[Path]:
    """Finished stage-2 runs of the embedded model: random adapters over one few-step adapter. With
    `changes`, a run of each of these settings."""
    plain = ["model.few_step=x", "model.autocast=null"]
    configs = [load_config("demo_tilt", [*plain, *own]) for own in changes or [[]] * count]
    place = resolve_path(configs[0].model.path)
    backbone = load_backbone(place, device="cpu", parts="image")
    settings = AdapterSettings(2, 4.0, backbone.lora_targets())
    shapes = adapter_roles(backbone, settings, seed=0).generator.state()
    runs = []
    for i, config in enumerate(configs):
        run = make_run(folder / f"tilt-{i}")
        (run / "config.yaml").write_text(dump_config(config))
        tensors = {"few_step": random_like(shapes, 0), "ema": random_like(shapes, i + 1)}
        facts = {"stage": "tilt", "adapters": vars(settings), "few_step_adapters": vars(settings)}
        export_checkpoint(config, Checkpoint(3, tensors, facts), run / "export")
        runs.append(run)
    return runs
