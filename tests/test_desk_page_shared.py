"""The page where answers come late, another browser asks for something else, or runs end apart."""

from __future__ import annotations

import pytest
from chromium import NEEDED, Kept, check_access, opened
from desk_data import (
    TOKEN,
    add_lines,
    add_sizes,
    make_evaluation,
    make_run,
    make_tilts,
    served,
    wait_for_pair,
)

from tiltflow.data.preferences import read_votes
from tiltflow.desk.app import Desk

pytestmark = NEEDED
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
PROMPTS = ["one", "two", "three"]
SCORES = {"teacher": [0.9, 0.8, 0.7], "ac_dmd": [0.1, 0.2, 0.3], "rtdmd": [0.4, 0.5, 0.6]}


@pytest.fixture
def desk(tmp_path):
    run = make_run(tmp_path / "run")
    make_evaluation(run / "evaluation.json", SCORES, PROMPTS)
    return Desk([run], tmp_path / "votes.jsonl")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_size_is_an_evaluation_of_its_own(browser, desk, tmp_path, size):
    add_sizes(tmp_path / "run" / "evaluation.json", ["16x32", "48x16"])
    with served(desk) as client, opened(browser, size) as (page, said):
        page.goto(f"{client.address}/?token={TOKEN}#compare")
        page.wait_for_selector(".compare")
        wide = "() => document.querySelector('.picture img')?.naturalWidth"
        page.wait_for_function(f"() => ({wide})() === 32")
        assert page.locator("td .score").first.inner_text() == "0.9"
        check_access(page)
        page.get_by_label("Evaluation").select_option(label="run: 48x16")
        page.wait_for_function(f"() => ({wide})() === 16")
        assert page.locator("td .score").first.inner_text() == "1.9"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert said == []


def test_an_answer_that_comes_late_does_not_take_the_place_of_a_later_one(browser, desk):
    with served(desk) as client, opened(browser, SIZES["desktop"]) as (page, said):
        kept = Kept(page, "**/rows?*baseline=teacher*")
        page.goto(f"{client.address}/?token={TOKEN}#compare")
        page.wait_for_selector(".compare")
        page.get_by_label("Compared with").select_option("teacher")
        page.get_by_label("Compared with").select_option("rtdmd")
        told = "() => document.querySelector('caption').innerText.includes('difference to rtdmd')"
        page.wait_for_function(told)
        with page.expect_event("requestfinished", lambda sent: "baseline=teacher" in sent.url):
            kept.wait().continue_()
        page.wait_for_timeout(100)
        assert page.evaluate(told)
        figures = page.locator("thead .figures").all_inner_texts()
        assert "baseline" in figures[2] and "baseline" not in figures[0]
        assert said == []


def test_a_vote_that_is_still_on_its_way_does_not_bring_back_its_match(browser, desk):
    with served(desk) as client, opened(browser, SIZES["phone"]) as (page, said):
        kept = Kept(page, "**/api/vote")
        page.goto(f"{client.address}/?token={TOKEN}#vote")
        wait_for_pair(page)
        page.keyboard.press("1")
        kept.wait()
        page.get_by_label("better than this one?").select_option("teacher")
        title = "() => document.querySelector('.tally h2')?.innerText"
        page.wait_for_function(f"() => ({title})() === 'rtdmd against teacher'")
        pair = page.locator(".sides img").first.get_attribute("src")
        with page.expect_event("requestfinished", lambda sent: sent.url.endswith("/api/vote")):
            kept.wait().continue_()
        page.wait_for_timeout(100)
        assert page.evaluate(title) == "rtdmd against teacher"
        assert page.locator(".sides img").first.get_attribute("src") == pair
        assert "No votes yet" in page.locator(".result").inner_text()
        assert said == []
    (vote,) = read_votes(desk.ballot.file)
    assert {vote["system_a"], vote["system_b"]} == {"rtdmd", "ac_dmd"}


def test_no_vote_is_given_on_images_that_are_not_there_yet(browser, desk):
    with served(desk) as client, opened(browser, SIZES["desktop"]) as (page, _):
        kept = Kept(page, "**/api/pair/*/left")
        page.goto(f"{client.address}/?token={TOKEN}#vote", wait_until="commit")
        page.wait_for_selector(".sides img >> nth=1")
        page.keyboard.press("1")
        page.wait_for_function("() => said.innerText.includes('Not noted')")
        assert read_votes(desk.ballot.file) == []
        kept.wait().continue_()
        wait_for_pair(page)
        page.unroute("**/api/pair/*/left")
        page.keyboard.press("1")
        page.wait_for_function(
            "() => document.querySelector('.result').innerText.includes('1 vote.')"
        )


def test_another_browsers_student_is_not_shown_as_this_ones(browser, tmp_path):
    (run,) = make_tilts(tmp_path, 1)
    with (
        served(Desk([run], tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZES["desktop"]) as (page, _),
    ):
        page.goto(f"{client.address}/?token={TOKEN}#dial")
        page.get_by_role("button", name="Load the student").click()
        page.wait_for_function("() => document.querySelector('.made')?.naturalWidth === 64")
        before = page.locator(".made").get_attribute("src")
        ids = [each["id"] for each in client.json("/api/overview")["runs"]]
        client.json("/api/dial/load", {"runs": ids, "side": 32})
        page.get_by_role("slider", name="tilt-0").focus()
        page.keyboard.press("End")
        page.wait_for_function("() => said.innerText.includes('another student has been loaded')")
        assert page.locator(".made").get_attribute("src") == before
        page.get_by_role("button", name="Score all strengths").click()
        page.wait_for_timeout(300)
        assert page.locator(".plots .readout").count() == 0


def test_a_dial_of_two_runs_names_the_one_that_trained_on_a_reward(browser, tmp_path):
    runs = make_tilts(
        tmp_path,
        changes=[
            ["rewards={clipscore: 1.0}", "watch.rewards={shapes: 1.0}"],
            ["rewards={clipscore_heldout: 1.0}", "watch.rewards={clipscore: 1.0}"],
        ],
    )
    with (
        served(Desk(runs, tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZES["desktop"]) as (page, said),
    ):
        page.goto(f"{client.address}/?token={TOKEN}#dial")
        page.get_by_role("checkbox", name="tilt-0").check()
        page.get_by_role("button", name="Load the student").click()
        page.get_by_role("slider", name="tilt-0").wait_for()
        page.get_by_label("Steps").fill("1")
        page.get_by_role("button", name="Score all strengths").click()
        page.wait_for_function("() => document.querySelectorAll('.plots figcaption').length === 3")
        assert sorted(page.locator(".plots figcaption").all_inner_texts()) == [
            "clipscore (trained: tilt-0)",
            "clipscore_heldout (trained: tilt-1)",
            "shapes (held out)",
        ]
        texts = page.locator(".plots .readout").all_inner_texts()
        assert all("strength of tilt-1 " in text for text in texts)
        assert said == []


def test_a_run_that_ended_earlier_is_read_off_where_it_ended(browser, tmp_path):
    make_run(tmp_path / "long", steps=40)
    make_run(tmp_path / "short", steps=20)
    add_lines(tmp_path / "long", [50])
    with (
        served(Desk([tmp_path], tmp_path / "votes.jsonl")) as client,
        opened(browser, SIZES["phone"]) as (page, said),
    ):
        page.goto(f"{client.address}/?token={TOKEN}")
        page.wait_for_selector("#runs .card")
        page.get_by_role("checkbox", name="long").check()
        page.wait_for_selector(".state >> nth=1")
        texts = page.locator(".readout").first.locator("span").all_inner_texts()
        assert texts[0] == "step 50" and texts[1].strip() == "short 0.2 (at 20)"
        assert texts[2].strip() == "long 0.5"
        # levels that differ in the fifth digit have labels that differ
        labels = page.evaluate(
            "async () => { const { chart } = await import('/page/chart.js');"
            " const made = chart([{ name: 'x', colour: 'red', points: [[0, .12345], [1, .1235]] }],"
            " { title: 'x' }); return [...made.querySelectorAll('text[text-anchor=end]')]"
            ".map(t => t.textContent) }"
        )
        assert len(labels) > 2 and len(set(labels)) == len(labels)
        assert said == []
