"""A rank that is stopped or killed is named, the others end, and what was saved stays whole."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import ranks_worker
import torch
from ranks_worker import finish, fork_server, start
from rich.console import Console
from torchruns import torchrun

from tiltflow.config.load import load_config
from tiltflow.core import distributed
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.distributed import ranks_of_job
from tiltflow.core.heartbeat import Heartbeat
from tiltflow.core.metrics import read_metrics

LIMIT = 5.0


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


class Memory:
    """A store in memory; `frozen` holds every call up until it is thawed."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.thawed = threading.Event()
        self.thawed.set()

    def set(self, key: str, value: str) -> None:
        self.thawed.wait()
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self.thawed.wait()
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.thawed.wait()
        return [self.values[key].encode() for key in keys]


class Job:
    """Heartbeats of several ranks in this process, and what they have said."""

    def __init__(self, size: int, limit: float = 0.4) -> None:
        self.store = Memory()
        self.said: dict[int, tuple[str, bool]] = {}
        self.stores = [Gate(self.store) for _ in range(size)]
        self.ranks = [
            Heartbeat(self.stores[r], r, size, limit, self.hear(r), "rank 0 on host h", 0)
            for r in range(size)
        ]

    def hear(self, rank: int):
        return lambda sentence, speaks: self.said.update({rank: (sentence, speaks)})

    def wait(self, seconds: float, ranks: tuple[int, ...] = ()) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (ranks and set(ranks) <= set(self.said)):
            time.sleep(0.01)


class Gate(Memory):
    """One rank's connection to the store: as long as it is not thawed, the rank stands still."""

    def __init__(self, store: Memory) -> None:
        super().__init__()
        self.values = store.values


@pytest.fixture
def job() -> Iterator[Job]:
    made = Job(3)
    yield made
    for gate in made.stores:
        gate.thawed.set()
    for rank in made.ranks:
        rank.close()


def test_ranks_that_beat_are_left_alone(job: Job) -> None:
    job.wait(1.2)
    assert not job.said
    job.ranks[2].close()  # done before the others, which is no silence
    job.wait(1.2)
    assert not job.said


def test_the_silent_rank_is_named_by_the_others_and_one_speaks(job: Job) -> None:
    job.wait(0.2)
    job.stores[1].thawed.clear()
    job.wait(5, (0, 2))
    for rank, speaks in ((0, True), (2, False)):
        sentence, first = job.said[rank]
        assert sentence.startswith(f"rank 1 on host {os.uname().nodename} has been silent for ")
        assert "(since " in sentence and first == speaks
    assert job.ranks[0].given_up


def test_the_next_rank_speaks_where_the_first_is_silent(job: Job) -> None:
    job.wait(0.2)
    job.stores[0].thawed.clear()
    job.wait(5, (1, 2))
    assert job.said[1][1] and not job.said[2][1]
    assert job.said[1][0].startswith("rank 0 on host")


def test_a_rank_cut_off_from_the_store_says_whose_it_is(job: Job) -> None:
    job.wait(0.2)
    job.stores[2].thawed.clear()
    job.wait(5, (2,))
    assert job.said[2][0].startswith("rank 0 on host h has been silent for ")


def test_what_is_lost_is_explained(job: Job) -> None:
    """After a broken connection: who failed, who is silent, who has not come as far."""
    assert job.ranks[0].explain(0) is None
    job.ranks[0].collectives = 3
    job.ranks[1].collectives = 3
    job.wait(0.2)
    assert "rank 2" in job.ranks[0].explain(0) and "begun 0" in job.ranks[0].explain(0)
    job.stores[2].thawed.clear()
    job.wait(0.15)
    assert "rank 2" in (found := job.ranks[0].explain(1)) and "has been silent" in found
    job.ranks[1].close("ended with ValueError")
    job.wait(0.1)
    assert job.ranks[0].explain(1).endswith("ended with ValueError")


def test_the_limit_is_a_setting_with_bounds() -> None:
    assert load_config("mixture_cold_start").run.rank_timeout == 100
    assert load_config("mixture_cold_start", ["run.rank_timeout=600"]).run.rank_timeout == 600
    for value in ("0", "4", "1e9", ".inf", ".nan", "-5"):
        with pytest.raises(ValueError, match=r"run\.rank_timeout"):
            load_config("mixture_cold_start", [f"run.rank_timeout={value}"])


def run(server: ForkServerContext, out: Path, size: int) -> list:
    """Ranks in a run without end, once a checkpoint is there."""
    arguments = [
        "train.batch_size=6", "train.steps=1000000", "train.schedule=constant", "log.every=1",
        "checkpoint.every=2", f"run.out={out}", "run.device=cpu", f"run.rank_timeout={LIMIT}",
    ]  # fmt: skip
    log = out.with_suffix(".logs")
    ranks = start(server, size, ranks_worker.train, "mixture_cold_start", arguments, log=log)
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and len(read_metrics(metrics)) > 3):
        assert all(rank.is_alive() for rank in ranks), (log / "0.txt").read_text()
        time.sleep(0.05)
    return ranks


def said(out: Path, rank: int) -> str:
    return (out.with_suffix(".logs") / f"{rank}.txt").read_text()


def lose(server: ForkServerContext, out: Path, size: int, victim: int, number: int) -> float:
    """Loses a rank by a signal; the seconds until all others had ended, as they should."""
    ranks = run(server, out, size)
    began = time.monotonic()
    os.kill(ranks[victim].pid, number)
    living = [rank for i, rank in enumerate(ranks) if i != victim]
    try:
        statuses = finish(living, 30)
    finally:
        ranks[victim].kill()
        finish([ranks[victim]], 10)
    assert all(status == 1 for status in statuses), statuses
    assert load_checkpoint(out).step == latest_step(out) >= 2
    return time.monotonic() - began


@pytest.mark.parametrize(("size", "victim"), [(2, 1), (3, 0)])
def test_a_stopped_rank_is_named_and_the_job_ends(
    size: int, victim: int, server: ForkServerContext, tmp_path: Path
) -> None:
    """The job's store is rank 0's here, so its stopping holds up everybody else's reading too."""
    out = tmp_path / "run"
    took = lose(server, out, size, victim, signal.SIGSTOP)
    assert LIMIT <= took < 3 * LIMIT
    first = 1 if victim == 0 else 0
    lines = [line for line in said(out, first).splitlines() if line.startswith("tiltflow: ")]
    assert len(lines) == 1 and f"rank {victim} on host" in lines[0], lines
    assert "has been silent for 5 s (since " in lines[0] and "Traceback" not in said(out, first)
    for other in set(range(size)) - {victim, first}:
        assert "tiltflow" not in said(out, other)


@pytest.mark.long
@pytest.mark.parametrize("number", range(4))
def test_ranks_hung_or_killed(number: int, server: ForkServerContext, tmp_path: Path) -> None:
    """At random moments, any rank of two or three; the run goes on from what was saved."""
    chance = random.Random(number)
    out, size = tmp_path / "run", chance.choice((2, 3))
    victim, kind = chance.randrange(size), signal.SIGSTOP if number % 2 else signal.SIGKILL
    took = lose(server, out, size, victim, kind)
    text = "".join(said(out, rank) for rank in range(size) if rank != victim)
    assert took < (3 * LIMIT if number % 2 else 10)
    assert (f"rank {victim} on host" in text) if number % 2 else ("lost another rank" in text)
    step = latest_step(out)
    more = [f"run.out={out}", "run.resume=true", f"train.steps={step + 3}", "run.device=cpu"]
    ranks = start(
        server, size, ranks_worker.train, str(out / "config.yaml"), more, log=tmp_path / "again"
    )
    assert finish(ranks, 60) == [0] * size


def test_a_rank_that_is_long_about_something_is_left_alone(
    server: ForkServerContext, tmp_path: Path
) -> None:
    """One waits for three times the limit before it comes to the collective."""
    ranks = start(server, 2, slow_to_come, 1.0, 3.0, log=tmp_path / "logs")
    assert finish(ranks, 60) == [0, 0]
    assert (tmp_path / "logs" / "0.txt").read_text() == "2\n"


def slow_to_come(limit: float, seconds: float, console: Console) -> None:
    with ranks_of_job(torch.device("cpu"), limit) as ranks:
        if not ranks.main:
            time.sleep(seconds)
        total = ranks.total([1.0])[0]
        if ranks.main:
            console.print(f"{total:.0f}")


def test_a_rank_that_fails_is_named_with_its_error(
    server: ForkServerContext, tmp_path: Path
) -> None:
    ranks = start(server, 2, fails, 4.0, log=tmp_path / "logs")
    assert finish(ranks, 60) == [1, 1]
    said = (tmp_path / "logs" / "0.txt").read_text()
    assert f"tiltflow: rank 1 on host {os.uname().nodename} ended with KeyError" in said


def fails(limit: float, console: Console) -> None:
    distributed.LINGER = 2.0
    with ranks_of_job(torch.device("cpu"), limit) as ranks:
        ranks.total([1.0])
        if not ranks.main:
            raise KeyError("x")
        ranks.total([1.0])


@pytest.mark.long
def test_torchrun_says_which_rank_was_silent(tmp_path: Path) -> None:
    job, victim = torchrun(tmp_path, "run.rank_timeout=5")
    os.kill(victim, signal.SIGSTOP)
    assert job.wait(timeout=90) != 0
    sentence = f"rank 1 on host {os.uname().nodename} has been silent for 5 s (since "
    said = (tmp_path / "said.txt").read_text()
    summary = said[said.index("FAILED") :]
    assert said.count(f"tiltflow: {sentence}") == 1 and f"PeerLost: {sentence}" in summary
