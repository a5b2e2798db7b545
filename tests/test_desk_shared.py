"""What several browsers, evaluations made anew and several sizes must not mix on the desk."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
import time

import pytest
from desk_data import add_lines, add_sizes, make_evaluation, make_run, save_image, served
from PIL import Image

from tiltflow.data.preferences import append_vote, read_votes
from tiltflow.desk import runs
from tiltflow.desk.app import Desk
from tiltflow.desk.sets import Choice, look

PROMPTS = ["one", "two", "three", "four"]
SCORES = {"ac_dmd": [0.1, 0.2, 0.3, 0.1], "rtdmd": [0.4, 0.5, 0.6, 0.2]}


def first_set(desk: Desk) -> str:
    return desk.overview()["sets"][0]["id"]


def test_browsers_that_read_a_log_at_once_count_its_lines_once(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=0)
    (run / "metrics.jsonl").unlink()
    steps = list(range(2, 42))
    add_lines(run, steps)

    def slowly(line: bytes) -> object:
        time.sleep(0.001)
        return read_row(line)

    read_row = runs._row
    monkeypatch.setattr(runs, "_row", slowly)
    log, seen = runs.Log(run / "metrics.jsonl"), []
    readers = [threading.Thread(target=lambda: seen.append(runs.view(run, log))) for _ in range(6)]
    for each in readers:
        each.start()
    for each in readers:
        each.join()
    curves = [[step for step, _ in found["curves"]["held_out/shapes"]] for found in seen]
    assert curves == [steps] * len(readers)


def test_an_alarm_stays_in_the_list_however_many_lines_follow_it(tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    (run / "watch.jsonl").write_text("")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "watch/alarms": 2.0}) + "\n")
    add_lines(run, range(6, 2000))
    found = runs.summary(run)
    assert (found["alarms"], found["step"]) == (2, 1999)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2000, "watch/alarms": 0.0}) + "\n")
    assert runs.summary(run)["alarms"] == 0


def test_each_size_has_its_own_scores_under_its_own_images(tmp_path):
    file = make_evaluation(tmp_path / "a" / "evaluation.json", SCORES, PROMPTS)
    add_sizes(file, ["16x32", "48x16"])
    desk = Desk([file], tmp_path / "votes.jsonl")
    sets = desk.overview()["sets"]
    assert [each["name"] for each in sets] == ["a: 16x32", "a: 48x16"]
    with served(desk) as client:
        for k, (size, each) in enumerate(zip([(32, 16), (16, 48)], sets, strict=True)):
            address = f"/api/set/{each['id']}"
            rows = client.json(f"{address}/rows?reward=shapes&baseline=ac_dmd")["rows"]
            assert rows[0]["scores"] == {"ac_dmd": 0.1 + k, "rtdmd": 0.4 + k}
            assert rows[0]["images"] == ["ac_dmd", "rtdmd"]
            image = client.ask(f"{address}/image/rtdmd/0")[1]
            assert Image.open(io.BytesIO(image)).size == size
            match = {"set": each["id"], "a": "rtdmd", "b": "ac_dmd"}
            pair = client.json("/api/pair", match)
            assert pair["tally"]["wins"] + pair["tally"]["losses"] == 0
            shown = client.ask(f"/api/pair/{pair['pair']}/left")[1]
            assert Image.open(io.BytesIO(shown)).size == size
            client.json("/api/vote", {"pair": pair["pair"], "choice": "left"})
    voted = [vote["image_a"].split("/")[-2] for vote in read_votes(desk.ballot.file)]
    assert voted == ["16x32", "48x16"]


def test_rewards_of_one_name_and_other_weights_are_not_compared(tmp_path):
    scores = {"teacher": [0.1, 0.2, 0.4, 0.1], "rtdmd": SCORES["rtdmd"]}
    for name, size in (("a", 5), ("b", 6)):
        file = make_evaluation(tmp_path / name / "evaluation.json", scores, PROMPTS)
        summary = json.loads(file.read_text())
        files = [["w.safetensors", size, 0]]
        summary["asked"]["rewards"] = {"shapes": {"path": "x", "files": files}}
        file.write_text(json.dumps(summary))
    desk = Desk([tmp_path / n / "evaluation.json" for n in "ab"], tmp_path / "votes.jsonl")
    table = desk.table(first_set(desk))
    assert table.rewards == ["shapes, a", "shapes, b"]
    shown = look(table, Choice("shapes, a", "rtdmd, a"))["columns"]
    assert [c["name"] for c in shown if c["mean"]] == ["teacher, a", "rtdmd, a"]
    assert [c["name"] for c in shown if c["difference"]] == ["teacher, a"]


@pytest.mark.parametrize(
    ("features", "shown"),
    [
        (("one", "two"), ["shapes", "diversity, a", "diversity, b"]),
        (("one", "one"), ["shapes", "diversity"]),
        (("one", None), ["shapes", "diversity"]),  # an earlier version did not say
    ],
)
def test_diversities_in_different_features_are_not_compared(tmp_path, features, shown):
    for name, reward in zip("ab", features, strict=True):
        file = make_evaluation(tmp_path / name / "evaluation.json", SCORES, PROMPTS, images=False)
        if reward is not None:
            said = {"diversity_in": {"reward": reward, "weights": None}}
            file.write_text(json.dumps(json.loads(file.read_text()) | said))
        path = file.with_suffix(".scores.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for scores in (scores for row in rows for scores in row["scores"].values()):
            scores["diversity"] = 0.5
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    desk = Desk([tmp_path / n / "evaluation.json" for n in "ab"], tmp_path / "votes.jsonl")
    assert desk.table(first_set(desk)).rewards == shown


def test_a_reward_of_some_prompts_is_shown_on_these(tmp_path):
    file = make_evaluation(tmp_path / "evaluation.json", SCORES, PROMPTS, images=False)
    path = file.with_suffix(".scores.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i in (0, 2):
        for k, scores in enumerate(rows[i]["scores"].values()):
            scores["diversity"] = 0.5 + i / 10 + k * (1 + i)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    desk = Desk([file], tmp_path / "votes.jsonl")
    shown = look(desk.table(first_set(desk)), Choice("diversity", "ac_dmd"))["columns"]
    assert [column["mean"]["value"] for column in shown] == pytest.approx([0.6, 2.6])
    assert [column["mean"]["n"] for column in shown] == [2, 2]
    assert shown[1]["difference"]["difference"] == pytest.approx(2.0)


def test_an_image_is_its_systems_when_another_evaluation_goes(tmp_path):
    make_evaluation(tmp_path / "a" / "evaluation.json", {"first": [0.1, 0.3]}, ["x", "y"])
    make_evaluation(tmp_path / "b" / "evaluation.json", {"other": [0.1, 0.4]}, ["x", "y"])
    save_image(tmp_path / "b" / "evaluation.images" / "other" / "00000.png", (9, 200, 9))
    desk = Desk([tmp_path / n / "evaluation.json" for n in "ab"], tmp_path / "votes.jsonl")
    key = first_set(desk)
    with served(desk) as client:
        before = client.ask(f"/api/set/{key}/image/other/0")[1]
        assert before != client.ask(f"/api/set/{key}/image/first/0")[1]
        (tmp_path / "a" / "evaluation.json").unlink()
        assert client.ask(f"/api/set/{key}/image/other/0")[1] == before
        gone, said = client.ask(f"/api/set/{key}/image/first/0")
        assert gone.status == 422 and b"no such system" in said


def test_votes_are_of_the_images_that_were_seen(tmp_path):
    """An evaluation made anew in its place has other images under the same names."""
    file = tmp_path / "run" / "evaluation.json"
    make_evaluation(file, SCORES, PROMPTS)
    desk = Desk([file], tmp_path / "votes.jsonl")
    match = {"set": first_set(desk), "a": "rtdmd", "b": "ac_dmd"}
    with served(desk) as client:
        pair = client.json("/api/pair", match)
        for _ in range(3):
            pair = client.json("/api/vote", {"pair": pair["pair"], "choice": "left"})
        assert pair["tally"]["wins"] + pair["tally"]["losses"] == 3
        make_evaluation(file, SCORES, PROMPTS)  # the same images once more
        assert client.json("/api/pair", match)["tally"]["other"] == 0
        shown = client.json("/api/pair", match)["pair"]
        for row in range(4):
            save_image(file.with_suffix(".images") / "rtdmd" / f"{row:05d}.png", (1, 2, row))
        refused, said = client.ask("/api/vote", body={"pair": shown, "choice": "left"})
        assert refused.status == 422 and b"made anew" in said
        tally = client.json("/api/pair", match)["tally"]
    assert (tally["wins"], tally["losses"], tally["other"]) == (0, 0, 3)
    assert tally["interval"] == [0, 1] and tally["rate"] is None
    assert len(read_votes(tmp_path / "votes.jsonl")) == 3


def test_votes_stay_when_another_evaluation_gives_their_system_another_name(tmp_path):
    """Beside a second "rtdmd" the first one is called by its run, too; and it may move."""
    first, second = (make_run(tmp_path / name) for name in ("first", "second"))
    make_evaluation(first / "evaluation.json", SCORES, PROMPTS)
    desk = Desk([first, second], tmp_path / "votes.jsonl")
    match = {"set": first_set(desk), "a": "rtdmd", "b": "ac_dmd"}
    with served(desk) as client:
        pair = client.json("/api/pair", match)
        for choice in ("left", "right", "left", "tie"):
            pair = client.json("/api/vote", {"pair": pair["pair"], "choice": choice})
        before = pair["tally"]
        assert before["wins"] + before["losses"] == 3 and before["ties"] == 1
        better = {**SCORES, "rtdmd": [x + 0.1 for x in SCORES["rtdmd"]]}
        make_evaluation(second / "evaluation.json", better, PROMPTS)
        for row in range(len(PROMPTS)):  # another student's
            save_image(second / "evaluation.images" / "rtdmd" / f"{row:05d}.png", (1, 2, row))
        client.json("/api/overview")
        assert client.json("/api/pair", match | {"a": "rtdmd, first"})["tally"] == before
        assert client.json("/api/pair", match | {"a": "rtdmd, second"})["tally"]["rate"] is None
        first.rename(tmp_path / "moved")
        desk.given[0] = tmp_path / "moved"
        client.json("/api/overview")
        assert client.json("/api/pair", match | {"a": "rtdmd, moved"})["tally"] == before


def test_the_page_hears_of_images_that_come_after_their_figures(tmp_path):
    """`evaluate` puts them in place last: whoever looked in between has to look again."""
    file = tmp_path / "run" / "evaluation.json"
    make_evaluation(file, SCORES, PROMPTS)
    desk, images = Desk([file], tmp_path / "votes.jsonl"), file.with_suffix(".images")
    images.rename(tmp_path / "made")
    between = desk.overview()["sets"]
    assert desk.overview()["sets"] == between
    (tmp_path / "made").rename(images)
    assert desk.overview()["sets"] != between


def test_a_vote_that_did_not_reach_the_disk_counts_once_when_given_again(tmp_path, monkeypatch):
    path, row = tmp_path / "votes.jsonl", {"prompt": "a", "image_a": "x", "image_b": "y"}
    append_vote(path, row | {"choice": "a"})

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            append_vote(path, row | {"choice": "tie"})
    append_vote(path, row | {"choice": "b"})
    assert [vote["choice"] for vote in read_votes(path)] == ["a", "b"]
