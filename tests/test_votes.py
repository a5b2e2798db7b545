"""Votes: the file survives kills and crowds, sides are blind, the interval holds."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from desk_data import make_evaluation, make_run, served

from tiltflow.data.preferences import append_vote, load_preferences, read_votes
from tiltflow.desk.app import Desk
from tiltflow.evaluation.anytime import log_evidence, win_rate_interval

ROW = {"prompt": "a", "image_a": "x.png", "image_b": "y.png", "choice": "a"}


@pytest.fixture
def desk(tmp_path):
    run = make_run(tmp_path / "run")
    scores = {"ac_dmd": [0.1, 0.2, 0.3], "rtdmd": [0.4, 0.5, 0.6]}
    make_evaluation(run / "evaluation.json", scores, ["one", "two", "three"])
    return Desk([run], tmp_path / "votes.jsonl")


def match_of(desk: Desk) -> dict[str, str]:
    return {"set": desk.overview()["sets"][0]["id"], "a": "rtdmd", "b": "ac_dmd"}


def test_a_vote_names_the_systems_that_were_on_its_sides(desk):
    with served(desk) as client:
        pair = client.json("/api/pair", match_of(desk))
        assert not {"rtdmd", "ac_dmd", "left", "right"} & set(json.dumps(pair).split('"'))
        shown = client.ask(f"/api/pair/{pair['pair']}/left")[1]
        answered = client.json("/api/vote", {"pair": pair["pair"], "choice": "left"})
        (vote,) = read_votes(desk.ballot.file)
        assert vote["prompt"] == pair["prompt"] and vote["choice"] == "a"
        assert (desk.ballot.file.parent / vote["image_a"]).read_bytes() == shown
        assert f"/{vote['system_a']}/" in vote["image_a"]
        won = vote["system_a"] == "rtdmd"
        assert (answered["tally"]["wins"], answered["tally"]["losses"]) == (won, not won)
        twice, said = client.ask("/api/vote", body={"pair": pair["pair"], "choice": "left"})
        assert twice.status == 422 and b"has been voted on" in said
        (chosen,) = load_preferences(desk.ballot.file)
        assert chosen.choice == 1 and chosen.images()[0].shape == (1, 3, 32, 32)


def test_every_prompt_is_shown_once_before_one_is_twice_and_sides_change(desk):
    with served(desk) as client:
        pair, prompts = client.json("/api/pair", match_of(desk)), []
        for _ in range(24):
            prompts.append(pair["prompt"])
            pair = client.json("/api/vote", {"pair": pair["pair"], "choice": "tie"})
    assert all(set(prompts[i : i + 3]) == {"one", "two", "three"} for i in range(0, 24, 3))
    assert {vote["system_a"] for vote in read_votes(desk.ballot.file)} == {"rtdmd", "ac_dmd"}
    assert pair["tally"]["rate"] == 0.5 and pair["tally"]["ties"] == 24


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 20000,
        b'{"a": "' + b"x" * 20000,
        {"pair": 1, "choice": "left"},
        {"pair": "0" * 16, "choice": "left"},
        {"pair": "x", "choice": "both"},
    ],
)
def test_what_is_no_vote_is_refused_in_a_sentence(desk, body):
    with served(desk) as client:
        response, said = client.ask("/api/vote", body=body)
    assert response.status == 422 and json.loads(said)["error"]
    assert not desk.ballot.file.exists()


def test_a_vote_that_cannot_be_written_is_said_and_its_pair_stays(desk, monkeypatch):
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with served(desk) as client:
        pair = client.json("/api/pair", match_of(desk))["pair"]
        with monkeypatch.context() as patched:
            patched.setattr("tiltflow.desk.votes.append_vote", full)
            response, said = client.ask("/api/vote", body={"pair": pair, "choice": "left"})
        assert response.status == 500 and b"No space left on device" in said
        assert client.json("/api/vote", {"pair": pair, "choice": "left"})["tally"]["ties"] == 0
    assert len(read_votes(desk.ballot.file)) == 1


def test_two_browsers_at_once_lose_no_vote(desk):
    with served(desk) as client:
        match = match_of(desk)

        def voter() -> None:
            pair = client.json("/api/pair", match)
            for _ in range(25):
                pair = client.json("/api/vote", {"pair": pair["pair"], "choice": "right"})

        voters = [threading.Thread(target=voter) for _ in range(2)]
        for each in voters:
            each.start()
        for each in voters:
            each.join()
        tally = client.json("/api/pair", match)["tally"]
    assert tally["wins"] + tally["losses"] == len(read_votes(desk.ballot.file)) == 50


def _append(path: Path, name: str) -> None:
    for i in range(40):
        append_vote(path, ROW | {"prompt": f"{name}{i}"})


@pytest.mark.long
def test_two_processes_at_once_lose_no_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_append, args=(path, name)) for name in "xy"]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert len({vote["prompt"] for vote in read_votes(path)}) == 80


@pytest.mark.long
def test_a_killed_writer_loses_at_most_its_last_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from tiltflow.data.preferences import append_vote\n"
        f"row = {ROW!r}\nn = int(sys.argv[2])\n"
        "while True:\n"
        "    append_vote(Path(sys.argv[1]), row | {'prompt': f'{n}' * 50}); n += 1\n"
        "    print(n, flush=True)\n"
    )
    done = 0
    for attempt in range(3):
        started = [sys.executable, "-c", code, str(path), str(done)]
        with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(20 + attempt)]
            os.kill(writer.pid, signal.SIGKILL)
            said += writer.stdout.readlines()
        done = int([line for line in said if line.endswith("\n")][-1])
        assert len(read_votes(path)) >= done
        done = len(read_votes(path))


@pytest.mark.parametrize("cut", [2, 40])
def test_a_torn_line_is_left_out_and_then_cut_off(tmp_path, cut):
    path = tmp_path / "votes.jsonl"
    for name in "ab":
        append_vote(path, ROW | {"prompt": name * 70_000})  # longer than what is read at a time
    path.write_bytes(path.read_bytes()[:-cut])
    assert [vote["prompt"][0] for vote in read_votes(path)] == ["a"]
    append_vote(path, ROW | {"prompt": "c"})
    assert [vote["prompt"][0] for vote in read_votes(path)] == ["a", "c"]


def test_a_last_line_without_its_newline_is_a_vote(tmp_path):
    """As editors and scripts leave a file: the vote counts, and stays when another is added."""
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(json.dumps(ROW | {"prompt": name}) for name in "abc"))
    assert [vote["prompt"] for vote in read_votes(path)] == ["a", "b", "c"]
    append_vote(path, ROW | {"prompt": "d"})
    assert [vote["prompt"] for vote in read_votes(path)] == ["a", "b", "c", "d"]
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"prompt": "a"}))
    with pytest.raises(ValueError, match="line 2 is no vote"):
        read_votes(path)


def wilson(wins: float, losses: float) -> float:
    n, z = wins + losses, 1.959964
    share = wins / n
    return 2 * z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))


def test_at_200_votes_the_interval_is_at_most_1_7_times_wilsons_at_every_rate():
    for wins in np.arange(0, 200.5, 0.5):
        low, high = win_rate_interval(wins, 200 - wins)
        assert low <= wins / 200 <= high
        assert high - low <= 1.56 * wilson(wins, 200 - wins), wins


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("tied", [0.0, 0.5])
def test_voters_who_stop_when_they_like_rarely_stop_outside(truth, tied):
    """1,000 voters of up to 1,000 votes; each stops at the first vote at which the interval misses
    the truth, the worst that stopping can do. A share `tied` of the rarer side's are ties."""
    rng = np.random.default_rng(0)
    ties = rng.random((1000, 1000)) < tied * min(truth, 1 - truth)
    # a tie counts ½, so the others must win a little more (or less) often for the same mean
    share = (truth - 0.5 * tied * min(truth, 1 - truth)) / (1 - tied * min(truth, 1 - truth))
    votes = np.where(ties, 0.5, rng.random(ties.shape) < share)
    wins, losses = votes.cumsum(1), (1 - votes).cumsum(1)
    missed = (log_evidence(wins, losses, truth) > math.log(20)).any(1)
    assert missed.sum() <= 60
    assert missed.any()  # it is no wider than it needs to be


def test_the_interval_is_where_the_evidence_crosses_its_limit():
    low, high = win_rate_interval(30, 12.5)
    for end in (low, high):
        assert float(log_evidence(30, 12.5, end)) == pytest.approx(math.log(20), abs=1e-6)
    assert win_rate_interval(0, 0) == (0.0, 1.0)
    assert win_rate_interval(9, 0)[1] == 1.0
    with pytest.raises(ValueError, match="a win rate of"):
        win_rate_interval(-1, 2)


def test_votes_on_show_are_few_and_old_ones_go(desk, monkeypatch):
    monkeypatch.setattr("tiltflow.desk.votes.OPEN", 3)
    with served(desk) as client:
        began = time.perf_counter()
        pairs = [client.json("/api/pair", match_of(desk))["pair"] for _ in range(5)]
        assert time.perf_counter() - began < 5
        assert client.ask(f"/api/pair/{pairs[0]}/left")[0].status == 404
        assert client.ask(f"/api/pair/{pairs[4]}/left")[0].status == 200
