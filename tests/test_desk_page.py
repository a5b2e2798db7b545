"""The desk's page in a real browser: every view, by mouse and by keyboard, at two widths."""

from __future__ import annotations

import io
import re
import shutil

import numpy as np
import pytest
from chromium import NEEDED, Kept, check_access, opened
from desk_data import (
    ODD,
    TOKEN,
    add_lines,
    make_evaluation,
    make_run,
    make_tilts,
    served,
    wait_for_pair,
)
from PIL import Image

from tiltflow.data.preferences import read_votes
from tiltflow.desk.app import Desk
from tiltflow.tasks.dial_grid import compute_dial, picture_file

pytestmark = NEEDED
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("desk")
    captions = [*ODD, *(f"sample {i}" for i in range(3, 10))]
    make_run(place / "cold", stage="cold_start", prompts=captions)
    run = make_run(place / "tilt", rate=3e-4)
    prompts = [*ODD, *(f"prompt {i}" for i in range(27))]
    scores = {
        "teacher": [(i * 7 % 10) / 10 for i in range(30)],
        "ac_dmd": [(i * 3 % 10) / 20 for i in range(30)],
        "rtdmd": [0.4 + (i * 3 % 10) / 20 for i in range(30)],
    }
    categories = ["colours" if i % 3 else "counting" for i in range(30)]
    make_evaluation(run / "evaluation.json", scores, prompts, categories)
    return place


@pytest.fixture(scope="module")
def client(place):
    with served(Desk([place / "cold", place / "tilt"], place / "votes.jsonl")) as client:
        yield client


@pytest.fixture(params=SIZES)
def page(request, browser, client):
    """The open page; at the end, that it was silent and asked nobody else for anything."""
    asked: list[str] = []
    with opened(browser, SIZES[request.param]) as (page, said):
        page.on("request", lambda sent: asked.append(sent.url))
        page.goto(f"{client.address}/?token={TOKEN}")
        page.wait_for_selector("#runs .card")
        yield page
        assert said == []
        assert all(url.startswith(client.address) for url in asked) and asked


def check(page) -> None:
    """Nothing wider than the window, something to see in its screenshot, and no serious finding of
    axe-core."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    assert seen.size in SIZES.values() and len(seen.getcolors(1 << 24)) > 30
    check_access(page)


def open_view(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(f"#{name.lower()}:not([hidden]) > *")


def test_the_token_leaves_the_address_and_a_reload_works(page, client):
    assert page.url == f"{client.address}/#runs"
    page.reload()
    page.wait_for_selector("#runs .card")


def test_runs_grow_while_one_looks(page, place):
    assert page.locator(".state").count() == 1
    page.get_by_role("checkbox", name="cold").check()
    page.wait_for_selector(".state >> nth=1")
    differing = page.locator(".settings table").first
    assert "train.generator_lr" in differing.inner_text()
    check(page)
    before = page.locator(".readout").first.inner_text()
    last = int(page.locator(".state p").first.inner_text().split("step ")[1].split()[0])
    add_lines(place / "tilt", [last + 10])
    page.wait_for_function(
        "before => document.querySelector('.readout')?.innerText !== before", arg=before
    )
    assert f"step {last + 10}" in page.locator(".readout").first.inner_text()


def test_samples_slide_through_the_steps(page):
    slider = page.get_by_role("slider", name="step of the samples of tilt")
    slider.focus()
    page.keyboard.press("Home")
    assert "step 0" in page.locator(".slide").first.inner_text()
    address = page.locator("img.sheet").first.get_attribute("src")
    assert "/sample/0?drawn=" in address and address.endswith("&side=1280")


def test_samples_have_their_prompts(page):
    """Ten samples in two rows of eight: every window shows its own, above its own prompt."""
    page.get_by_role("checkbox", name="tilt").uncheck()
    page.get_by_role("checkbox", name="cold").check()
    page.wait_for_function("() => document.querySelectorAll('.tile').length === 10")
    assert page.locator(".tile figcaption").nth(0).inner_text() == ODD[0]
    assert page.locator(".tile figcaption").nth(9).inner_text() == "sample 9"
    page.wait_for_function(
        "() => [...document.querySelectorAll('.pane')].every(p => p.style.backgroundImage)"
    )
    for i in (0, 7, 9):
        pane = page.locator(".pane").nth(i)
        pane.scroll_into_view_if_needed()
        seen = np.asarray(Image.open(io.BytesIO(pane.screenshot())).convert("L"))
        middle = seen[
            seen.shape[0] // 4 : -seen.shape[0] // 4, seen.shape[1] // 4 : -seen.shape[1] // 4
        ]
        assert abs(float(middle.mean()) - 10 * i) < 2
        assert abs(seen.shape[0] - seen.shape[1]) <= 1
    check(page)


def test_every_sheet_stands_above_its_own_prompts(page, place):
    """A run went on from an earlier step, with other prompts; the first sheet keeps its own."""
    samples = place / "cold" / "samples"
    step = max(samples.glob("step-*.png"))
    (samples / "step-000000.txt").write_text("an older prompt\n")
    step.with_suffix(".txt").write_text("a newer prompt\na second one\n")
    try:
        page.get_by_role("checkbox", name="tilt").uncheck()
        page.get_by_role("checkbox", name="cold").check()
        page.wait_for_function("() => document.querySelectorAll('.tile').length === 2")
        page.get_by_role("slider", name="step of the samples of cold").focus()
        page.keyboard.press("Home")
        assert page.locator(".tile figcaption").all_inner_texts() == ["an older prompt"]
        page.keyboard.press("End")
        said = ["a newer prompt", "a second one"]
        assert page.locator(".tile figcaption").all_inner_texts() == said
        assert page.get_by_text("the whole sheet").count() == 1
    finally:
        for file in samples.glob("step-*.txt"):
            file.unlink()


def test_prompts_are_text(page):
    open_view(page, "Compare")
    for prompt in ODD:
        assert page.locator(".prompt").get_by_text(prompt, exact=True).count() == 1
    assert page.locator(".prompt img, .prompt b").count() == 0
    check(page)


def test_the_table_follows_what_is_chosen(page):
    open_view(page, "Compare")
    table = page.locator(".compare")
    before = table.locator("thead").inner_text()
    page.get_by_label("Compared with").select_option("teacher")
    page.wait_for_function(
        "t => document.querySelector('.compare thead')?.innerText !== t", arg=before
    )
    page.get_by_label("Category").select_option("counting")
    page.wait_for_function(
        "() => document.querySelector('caption')?.innerText.includes('10 of 30')"
    )
    page.get_by_label("Category").select_option("")
    page.get_by_label("Order").select_option("differ")
    page.wait_for_function("() => document.querySelector('.pager')?.innerText.includes('1 of 3')")
    page.get_by_role("button", name="later").click()
    page.wait_for_function("() => document.querySelector('.pager')?.innerText.includes('2 of 3')")
    page.get_by_role("checkbox", name="rtdmd").uncheck()
    page.wait_for_function("() => document.querySelectorAll('.compare thead th').length === 2")


def test_pictures_are_small_until_asked_for(page):
    open_view(page, "Compare")
    page.wait_for_function("() => document.querySelector('.picture img').complete")
    sources = page.locator(".picture img").evaluate_all("all => all.map(i => i.src)")
    assert sources and all(source.endswith("?side=192") for source in sources)
    page.locator(".picture").first.focus()
    page.keyboard.press("Enter")
    full = page.locator("dialog img.full")
    assert "?" not in full.get_attribute("src")
    assert page.locator("dialog h2").inner_text() == "teacher"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('dialog h2').innerText === 'ac_dmd'")
    check(page)
    page.keyboard.press("Escape")
    # the dialog goes with its own event, a moment after the key
    page.wait_for_function("() => !document.querySelector('dialog')")
    page.wait_for_function("() => document.activeElement.className === 'picture'")


def test_votes_by_keyboard_and_mouse_change_the_tally(page, place):
    before = len(read_votes(place / "votes.jsonl"))
    open_view(page, "Vote")
    page.wait_for_selector(".sides img >> nth=1")
    check(page)
    for number, press in enumerate(
        (
            lambda: page.keyboard.press("1"),
            lambda: page.get_by_role("button", name="right is better").click(),
            lambda: page.keyboard.press(" "),
        ),
        start=before + 1,
    ):
        wait_for_pair(page)
        pair = page.locator(".sides img").first.get_attribute("src")
        press()
        page.wait_for_function(
            "old => document.querySelector('.sides img')?.getAttribute('src') !== old", arg=pair
        )
        assert f"{number} vote" in page.locator(".result").inner_text()
    votes = read_votes(place / "votes.jsonl")[before:]
    assert [vote["choice"] for vote in votes] == ["a", "b", "tie"]
    page.reload()
    page.wait_for_selector(".result")
    assert f"{before + 3} votes" in page.locator(".result").inner_text()


def test_the_dial_turns_by_keyboard_and_draws_the_rewards(browser, tmp_path):
    runs = make_tilts(tmp_path, 1)
    with served(Desk(runs, tmp_path / "votes.jsonl")) as client:
        for size in SIZES.values():
            with opened(browser, size) as (page, said):
                page.goto(f"{client.address}/?token={TOKEN}#dial")
                page.get_by_role("button", name="Load the student").click()
                page.wait_for_function("() => document.querySelector('.made')?.naturalWidth === 64")
                before = page.locator(".made").get_attribute("src")
                page.get_by_role("slider", name="tilt-0").focus()
                page.keyboard.press("End")
                page.wait_for_function(
                    "old => document.querySelector('.made').getAttribute('src') !== old", arg=before
                )
                assert page.locator(".dial output").inner_text() == "1.50"
                page.get_by_role("button", name="Score all strengths").click()
                page.wait_for_function(
                    "() => [...document.querySelectorAll('.plots .readout')].length === 3"
                    " && document.querySelector('.plots .readout')"
                    ".innerText.includes('strength 1.5')"
                )
                check(page)
                assert said == []


def test_a_dial_computed_beforehand_turns_the_same_way(browser, tmp_path):
    (run,) = make_tilts(tmp_path, 1)
    given = {"seeds": [0, 1], "strengths": [0.0, 1.0, 1.5], "device": "cpu"}
    grid = compute_dial(run, run / "dial", ["a red circle", ODD[0]], **given)
    picture_file(run / "dial", 1, 1, 0).unlink()
    with served(Desk([run / "dial"], tmp_path / "votes.jsonl")) as client:
        for size in SIZES.values():
            with opened(browser, size) as (page, said):
                page.goto(f"{client.address}/?token={TOKEN}#dial")
                page.get_by_role("button", name="Show").click()
                page.wait_for_function("() => document.querySelector('.made')?.naturalWidth === 64")
                assert page.locator(".dial output").inner_text() == "1.00"
                assert page.locator(".made").get_attribute("src").endswith("/0/0/1")
                texts = page.locator(".plots .readout").all_inner_texts()
                assert re.match(r"strength 1\s", texts[0])  # where the dial is, not at its end
                page.get_by_role("slider", name=run.name).focus()
                page.keyboard.press("End")
                assert page.locator(".dial output").inner_text() == "1.50"
                assert page.locator(".made").get_attribute("src").endswith("/0/0/2")
                texts = page.locator(".plots .readout").all_inner_texts()
                assert len(texts) == 3 and "strength 1.5" in texts[0]
                assert (
                    page.locator(".plots figcaption").all_inner_texts()[0] == "clipscore (trained)"
                )
                page.get_by_label("Prompt").select_option(label=ODD[0])
                page.get_by_label("Seed").select_option(label=str(grid.seeds[1]))
                assert page.locator(".made").get_attribute("src").endswith("/1/1/2")
                page.get_by_role("slider", name=run.name).focus()
                page.keyboard.press("Home")
                assert "not computed yet (11 of 12 are)" in page.locator(".took").inner_text()
                assert not page.locator(".made").is_visible()
                check(page)
                assert said == []


def test_what_is_removed_or_broken_hides_nothing_else(browser, tmp_path):
    for name in ("first", "gone", "odd"):
        make_run(tmp_path / name)
    make_evaluation(tmp_path / "odd" / "evaluation.json", {"teacher": [0.1, 0.2]}, ["a", "b"])
    given = [tmp_path / name for name in ("first", "gone", "odd")]
    with (
        served(Desk(given, tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZES["desktop"]) as (page, said),
    ):
        page.goto(f"{client.address}/?token={TOKEN}")
        page.wait_for_selector("#runs .card")
        for box in page.locator("#runs .list input").all():
            box.check()
        page.wait_for_selector(".state >> nth=2")
        shutil.rmtree(tmp_path / "gone")
        (tmp_path / "odd" / "config.yaml").write_text("stage: [")
        (tmp_path / "odd" / "evaluation.json").write_text('{"prompts"')
        add_lines(tmp_path / "first", [70])
        page.wait_for_function(
            "() => document.querySelectorAll('.state').length === 2"
            " && document.querySelector('.notes').innerText.includes('step 70 of 40')"
            " && document.querySelector('.state .alarm')?.innerText.length > 10"
            " && document.querySelector('.list .alarm')?.innerText.includes('odd')",
            timeout=20_000,
        )
        assert page.locator("#runs .list label").count() == 2
        check(page)
        # the browser's own lines: 422 for the file that is none, 404 for what went in between
        assert [line for line in said if not re.search(r"\b(404|422)\b", line)] == []


def test_a_vote_that_the_desk_does_not_take_is_said_and_can_be_given_again(browser, tmp_path):
    run = make_run(tmp_path / "run")
    scores = {"ac_dmd": [0.1, 0.2, 0.3], "rtdmd": [0.4, 0.5, 0.6]}
    make_evaluation(run / "evaluation.json", scores, ["one", "two", "three"])
    votes = tmp_path / "votes.jsonl"
    with (
        served(Desk([run], votes)) as client,
        opened(browser, SIZES["phone"]) as (page, _),
    ):
        kept = Kept(page, "**/api/vote")
        page.goto(f"{client.address}/?token={TOKEN}#vote")
        wait_for_pair(page)
        pair = page.locator(".sides img").first.get_attribute("src")
        page.keyboard.press("1")
        kept.wait().abort()
        page.wait_for_function("() => said.innerText.includes('press again')")
        assert page.locator(".sides img").first.get_attribute("src") == pair
        page.unroute("**/api/vote")
        page.keyboard.press("1")
        page.wait_for_function(
            "() => document.querySelector('.result').innerText.includes('1 vote.')"
        )
        wait_for_pair(page)
        pair = page.locator(".sides img").first.get_attribute("src").split("/")[3]
        client.json("/api/vote", {"pair": pair, "choice": "left"})  # as in another window
        page.keyboard.press("2")
        page.wait_for_function("() => said.innerText.includes('has been voted on')")
        assert "2 votes" in page.locator(".result").inner_text()
    assert len(read_votes(votes)) == 2


def test_the_keyboard_alone_goes_through_the_views(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-runs"
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".compare")
    assert page.evaluate("document.activeElement.id") == "tab-compare"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"


def test_a_page_of_another_origin_neither_reads_nor_writes(browser, client, tmp_path):
    (tmp_path / "other").mkdir()
    with served(Desk([make_run(tmp_path / "other" / "run")], tmp_path / "votes.jsonl")) as other:
        context = browser.new_context()
        for each in (client, other):
            page = context.new_page()
            page.goto(f"{each.address}/?token={TOKEN}")
            page.wait_for_selector("#runs .card")
        # Now on the other desk's page, whose policy would stop it first: so from a bare one.
        page.route("**/bare", lambda route: route.fulfill(body="<p>", content_type="text/html"))
        page.goto(f"{other.address}/bare")
        asked = (
            "async ([address, options]) => fetch(address, options)"
            ".then(r => r.text(), e => 'refused')"
        )
        read = {"credentials": "include"}
        write = {**read, "method": "POST", "mode": "no-cors", "body": "{}"}
        assert page.evaluate(asked, [f"{client.address}/api/overview", read]) == "refused"
        assert page.evaluate(asked, [f"{client.address}/api/overview", write]) in ("", "refused")
        wide = page.evaluate(
            "address => new Promise(done => { const i = new Image(); i.onerror = () => done(0);"
            " i.onload = () => done(i.width); i.src = address })",
            f"{client.address}/page/icon.svg",
        )
        assert wide == 0
        context.close()
