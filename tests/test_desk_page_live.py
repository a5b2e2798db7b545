"""The desk's page while runs go on: it shows what has come, and leaves alone whoever looks."""

from __future__ import annotations

import pytest
from chromium import NEEDED, check_access, opened
from desk_data import (
    TOKEN,
    add_lines,
    make_evaluation,
    make_run,
    save_image,
    served,
    wait_for_pair,
)

from tiltflow.data.preferences import read_votes
from tiltflow.desk.app import Desk

pytestmark = NEEDED
SIZE = (1280, 860)
PROMPTS = [f"prompt {i}" for i in range(14)]


def scores(k: int) -> list[float]:
    return [(i * k % 10) / 10 for i in range(len(PROMPTS))]


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "tilt")
    systems = {"teacher": scores(3), "ac_dmd": scores(7)}
    make_evaluation(run / "evaluation.json", systems, PROMPTS)
    return run


@pytest.fixture
def page(browser, run, tmp_path):
    """The open page, which was silent at the end."""
    with (
        served(Desk([run], tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZE) as (page, said),
    ):
        page.goto(f"{client.address}/?token={TOKEN}")
        page.wait_for_selector("#runs .card")
        yield page
        assert said == []


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(f"#{name.lower()}:not([hidden]) > *")


def shown(page, selector: str, text: str) -> None:
    page.wait_for_function(
        "([place, text]) => document.querySelector(place)?.innerText.includes(text)",
        arg=[selector, text],
    )


def test_every_view_shows_what_has_come_since_it_was_opened(page, run):
    """A run ends, and its evaluation is made anew with another system."""
    for name, first in (("Compare", "teacher"), ("Vote", "teacher"), ("Dial", "Nothing to dial")):
        tab(page, name)
        shown(page, f"#{name.lower()}", first)
    (run / "export" / "tilt").mkdir(parents=True)
    shown(page, "#dial", "Load the student")
    tab(page, "Compare")
    make_evaluation(run / "evaluation.json", {"ac_dmd": scores(7), "rtdmd": scores(9)}, PROMPTS)
    shown(page, "#compare", "rtdmd")
    assert page.locator("#compare thead .name").all_inner_texts() == ["ac_dmd", "rtdmd"]
    tab(page, "Vote")
    shown(page, "#vote h2", "rtdmd against ac_dmd")
    assert page.locator("#said").inner_text() == ""


def test_what_was_chosen_stays_when_an_evaluation_is_made_anew(page, run):
    tab(page, "Compare")
    page.get_by_label("Compared with").select_option("teacher")
    page.wait_for_function("() => document.querySelector('caption').innerText.includes('teacher')")
    tab(page, "Vote")
    wait_for_pair(page)
    pair = page.locator(".sides img").first.get_attribute("src")
    systems = {"teacher": scores(3), "ac_dmd": scores(7), "rtdmd": scores(9)}
    make_evaluation(run / "evaluation.json", systems, PROMPTS)
    shown(page, "#vote .toolbar", "rtdmd")
    assert page.locator(".sides img").first.get_attribute("src") == pair
    tab(page, "Compare")
    shown(page, "#compare", "rtdmd")
    assert page.get_by_label("Compared with").input_value() == "teacher"


def test_a_curve_grows_under_whoever_reads_it_off(page, run):
    plot, read = page.locator(".plot").first, page.locator(".readout").first
    plot.focus()
    page.keyboard.press("Home")
    assert "step 0" in read.inner_text()
    add_lines(run, [50])
    shown(page, ".list", "step 50")
    page.wait_for_timeout(300)
    assert page.evaluate("document.activeElement.className") == "plot"
    assert "step 0" in read.inner_text()
    page.keyboard.press("End")
    assert "step 50" in read.inner_text()
    plot.blur()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    seen = read.inner_text()
    assert "step 50" not in seen
    add_lines(run, [60])
    shown(page, ".list", "step 60")
    page.wait_for_timeout(300)
    assert read.inner_text() == seen
    page.mouse.move(0, 0)
    assert "step 60" in read.inner_text()
    check_access(page)


def test_a_slider_stays_in_the_hand_while_its_run_goes_on(page, run):
    slider, said = page.get_by_label("step of the samples of tilt"), page.locator(".slide output")
    slider.focus()
    add_lines(run, [50])
    shown(page, ".list", "step 50")
    page.wait_for_timeout(300)
    page.keyboard.press("ArrowLeft")  # and not the page: it has the focus
    assert said.inner_text() == "step 0"
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    add_lines(run, [60])
    shown(page, ".list", "step 60")
    page.wait_for_timeout(300)
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert said.inner_text() == "step 40"
    save_image(run / "samples" / "step-000060.png", (9, 90, 160), 64)
    page.wait_for_function("() => document.querySelector('.slide output').innerText === 'step 60'")
    assert page.evaluate("document.activeElement.type") == "range"


def test_a_vote_says_nothing_of_the_sides_until_one_asks(page, tmp_path):
    """Which count has gone up tells whose image was chosen."""
    tab(page, "Vote")
    for number in (1, 2):
        wait_for_pair(page)
        page.keyboard.press("1")
        shown(page, ".result", f"{number} vote")
        assert "won" not in page.locator(".tally").inner_text()
        assert page.locator(".tally details").get_attribute("open") is None
        page.locator("summary", has_text="What they say").focus()
        page.keyboard.press(" ")  # opens it, and is no vote
        page.get_by_text("95% interval").wait_for()
    check_access(page)
    assert len(read_votes(tmp_path / "votes.jsonl")) == 2


def test_an_evaluation_that_cannot_be_read_is_said_and_the_pair_stays(browser, run, tmp_path):
    other = make_run(tmp_path / "other")
    make_evaluation(other / "evaluation.json", {"a": scores(3), "b": scores(7)}, PROMPTS, seed=1)
    with (
        served(Desk([run, other], tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZE) as (page, _),
    ):
        page.goto(f"{client.address}/?token={TOKEN}#vote")
        wait_for_pair(page)
        chosen = page.locator("[data-control=set] select")
        before, pair = chosen.input_value(), page.locator(".sides img").first.get_attribute("src")
        page.route("**/api/set/*", lambda route: route.abort())
        chosen.select_option(index=1)
        shown(page, "#said", "choose again when it does")
        assert page.locator(".sides img").first.get_attribute("src") == pair
        assert page.locator("[data-control=set] select").input_value() == before
        page.unroute("**/api/set/*")
        page.locator("[data-control=set] select").select_option(index=1)
        page.wait_for_function("() => !said.innerText.includes('choose again')")
        assert page.locator("[data-control=a] select").input_value() in ("a", "b")


def test_an_image_that_did_not_come_is_asked_for_again_and_not_voted_on(browser, run, tmp_path):
    with (
        served(Desk([run], tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZE) as (page, _),
    ):
        page.route("**/api/pair/*/left", lambda route: route.abort())
        page.goto(f"{client.address}/?token={TOKEN}#vote")
        page.wait_for_selector(".sides img >> nth=1")
        wait_for_pair(page)
        page.keyboard.press("1")
        shown(page, "#said", "did not come")
        assert read_votes(tmp_path / "votes.jsonl") == []
        page.unroute("**/api/pair/*/left")
        page.keyboard.press("1")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.sides img')].every(i => i.naturalWidth)"
        )
        page.keyboard.press("1")
        shown(page, ".result", "1 vote.")
    assert len(read_votes(tmp_path / "votes.jsonl")) == 1
