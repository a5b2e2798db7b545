"""Several gloo ranks: equal to one, resumed on another number, stopped, killed, and failing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import ranks_worker
import torch
from ranks_worker import finish, fork_server, start
from test_train import recipe
from torchruns import torchrun

from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.distributed import Ranks
from tiltflow.core.metrics import read_metrics

SRC = Path(__file__).parents[1] / "src"
Runner = Callable[..., Path]


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def run(server: ForkServerContext, home: Path) -> Runner:
    """Trains `name` of `recipe` on `size` ranks, which must succeed; the run directory."""

    def train(name: str, base: str, size: int, *overrides: str) -> Path:
        out = home / name
        arguments = [*overrides, f"run.out={out}", "run.device=cpu"]
        log = out / "logs" / f"{time.monotonic_ns()}"
        status = finish(start(server, size, ranks_worker.train, base, arguments, log=log))
        said = "\n".join(path.read_text() for path in sorted(log.iterdir()))
        assert status == [0] * size, said
        return out

    return train


MIXTURE = (
    "train.batch_size=30",
    "train.steps=20",
    "train.schedule=constant",
    "train.fake_scores=per_boundary",
    "log.every=5",
    "checkpoint.every=10",
)
TILT = (
    "tilt.group_size=5",
    "tilt.fake_score_updates=2",
    "tilt.kl=0.1",
    "checkpoint.every=10",
    "tilt.reward_normalise=true",
)


@pytest.fixture(scope="session")
def mixture(run: Runner) -> Callable[..., Path]:
    """A run of a stage on the mixture, 20 steps; one on one rank is made once."""
    made: dict[str, Path] = {}

    def train(stage: str, size: int = 1, *more: str, name: str = "") -> Path:
        name = f"{stage}_{size}_{name}"
        if name not in made:
            stages = (
                ("cold_start.generator_every=2",)
                if stage == "cold_start"
                else (*TILT, f"model.few_step={train('cold_start')}")
            )
            made[name] = run(name, f"mixture_{stage}", size, *MIXTURE, *stages, *more)
        return made[name]

    return train


def gap(a: Path, b: Path) -> float:
    """The largest relative difference (in norm) of a group of weights of two runs."""
    x, y = load_checkpoint(a).tensors, load_checkpoint(b).tensors
    assert x.keys() == y.keys() and load_checkpoint(a).step == load_checkpoint(b).step
    gaps = []
    for group in (name for name in x if not name.startswith("optimizer")):
        left, right = (torch.cat([v.flatten() for v in t[group].values()]) for t in (x, y))
        gaps.append(float((left - right).norm() / right.norm()))
    return max(gaps)


@pytest.mark.parametrize("size", range(1, 9))
def test_shares_are_a_partition_and_even(size: int) -> None:
    for n in (1, 7, 8, 24, 1000):
        rows = [list(range(n)[Ranks(rank, size).share(n)]) for rank in range(size)]
        assert list(itertools.chain(*rows)) == list(range(n))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        spread = [Ranks(rank, size).spread(n) for rank in range(size)]
        assert len({len(part) for part in spread}) == 1
        assert list(itertools.chain(*spread))[:n] == list(range(n))


def test_one_rank_changes_nothing() -> None:
    values = torch.randn(3, 2)
    before = values.clone()
    Ranks().sum_([values])
    assert torch.equal(values, before) and Ranks().gather(values, 3) is values
    assert Ranks().total([0.1, 2.0]) == [0.1, 2.0] and Ranks().from_main(7) == 7
    assert Ranks().any(True) and not Ranks().any(False)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_ranks_and_micro_batches_equal_one(stage: str, mixture: Callable[..., Path]) -> None:
    """Two ranks; four with uneven shares and groups that lie on several; six micro-batches."""
    one = mixture(stage)
    others = [
        mixture(stage, 2),
        mixture(stage, 4),
        mixture(stage, 1, "train.micro_batch_size=5", name="micro"),
    ]
    lines = read_metrics(one / "metrics.jsonl")
    for other in others:
        assert gap(other, one) < 1e-5, (other.name, gap(other, one))
        for row, expected in zip(read_metrics(other / "metrics.jsonl"), lines, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_ranks(
    stage: str, first: int, then: int, mixture: Callable[..., Path], run: Runner
) -> None:
    whole, name = mixture(stage), f"{stage}_{first}_to_{then}"
    base = str(whole / "config.yaml")
    run(name, base, first, "train.steps=10")
    out = run(name, base, then, "run.resume=true")
    assert gap(out, whole) < 1e-5
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [5, 10, 15, 20]


def test_ranks_that_go_on_between_two_lines_of_the_log_have_the_same_log(run: Runner) -> None:
    """Each with its own part of the sums, to the last bit."""
    more = [*MIXTURE, "log.every=4", "checkpoint.every=3", "train.steps=8", "checkpoint.keep=9"]
    out = run("between_lines", "mixture_cold_start", 3, *more)
    whole = (out / "metrics.jsonl").read_text()
    again = ("run.resume=true", "run.resume_from=step-000003")
    run("between_lines", str(out / "config.yaml"), 3, *again)
    assert (out / "metrics.jsonl").read_text() == whole


def test_a_shared_rollout_is_the_same_on_two_ranks_and_resumed_within_its_cycle(
    mixture: Callable[..., Path], run: Runner
) -> None:
    reuse = ("cold_start.reuse=3", "cold_start.generator_every=8")
    whole = mixture("cold_start", 1, *reuse, name="reuse")
    base = str(whole / "config.yaml")
    run("reuse_2_to_1", base, 2, "train.steps=10")  # iterations 8 to 10 share a rollout
    out = run("reuse_2_to_1", base, 1, "run.resume=true")
    assert gap(out, whole) < 1e-5


def test_a_term_with_weights_of_its_own_is_the_same_on_two_ranks(
    mixture: Callable[..., Path],
) -> None:
    own = ("tilt.terms={gan: {real_steps: 3, one_in: 4}}", "train.steps=6", "checkpoint.every=6")
    one, two = (mixture("tilt", size, *own, name="gan") for size in (1, 2))
    assert "gan_head" in load_checkpoint(one).tensors
    assert gap(two, one) < 1e-5


@pytest.mark.long
def test_a_pipelines_ranks_and_sharded_base_equal_one(
    run: Runner, tiny_pipeline: Callable[[str], Path], home: Path
) -> None:
    """Tiny SD3.5, both stages, gradient checkpointing; the sharded base is FSDP2's."""
    prompts = home / "prompts.txt"
    prompts.write_text("a cat\na dog\na red bird\n")
    reward = "{'weight': 1.0, 'options': {'differentiable': true}}"
    more = [
        "train.steps=3",
        "checkpoint.every=3",
        "log.every=3",
        "log.samples_every=3",
        "log.samples=3",
        "model.gradient_checkpointing=true",
        "watch.rewards={'test_train:bright': 1.0}",
        "watch.every=3",
        "watch.prompts=8",
    ]
    cold = None
    for stage in ("cold_start", "tilt"):
        of_stage = []
        if stage == "tilt":
            of_stage = [f"model.few_step={cold}", f"rewards={{'test_train:redness': {reward}}}"]
        arguments = recipe(stage, tiny_pipeline("sd35m"), prompts, home, *more, *of_stage)
        made = [
            run(f"sd3_{stage}_{name}", f"demo_{stage}", size, *arguments, *extra)
            for name, size, extra in (
                ("one", 1, []),
                ("two", 2, []),
                ("sharded", 2, ["run.sharding=fsdp2"]),
            )
            if stage == "tilt" or name != "two"
        ]
        one = made[0]
        for other in made[1:]:
            assert gap(other, one) < 1e-5, (other.name, gap(other, one))
            rows = [read_metrics(r / "metrics.jsonl")[-1] for r in (other, one)]
            assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)
            assert "held_out/test_train:bright" in rows[0]
            assert (other / "samples" / "step-000003.png").is_file()
        cold = one


def test_evaluation_split_over_ranks_is_the_same(server: ForkServerContext, home: Path) -> None:
    found = []
    for size in (1, 2, 4):
        out = home / f"evaluation_{size}.npz"
        log = home / f"evaluation_{size}"
        assert finish(start(server, size, ranks_worker.evaluate, out, log=log)) == [0] * size
        found.append((dict(np.load(out)), json.loads(out.with_suffix(".json").read_text())))
    for arrays, summary in found[1:]:
        assert summary == found[0][1]
        assert all(np.array_equal(arrays[name], found[0][0][name]) for name in found[0][0])


def long_run(server: ForkServerContext, out: Path, size: int) -> list:
    """Ranks in a run without end, once it has logged something."""
    arguments = [
        *MIXTURE, "train.steps=1000000", "checkpoint.every=1000", f"run.out={out}", "run.device=cpu"
    ]  # fmt: skip
    base, log = "mixture_cold_start", out.with_suffix(".logs")
    ranks = start(server, size, ranks_worker.train, base, arguments, log=log)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and read_metrics(metrics)) and time.monotonic() < deadline:
        assert all(rank.is_alive() for rank in ranks), (log / "0.txt").read_text()
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_one_rank_saves_and_ends_all(
    number: signal.Signals, server: ForkServerContext, home: Path
) -> None:
    out = home / f"stopped_{number.name}"
    ranks = long_run(server, out, 2)
    os.kill(ranks[1].pid, number)
    assert finish(ranks, 60) == [0, 0]
    step = latest_step(out)
    assert step and step == load_checkpoint(out).step
    said = (out.with_suffix(".logs") / "0.txt").read_text()
    command = f"torchrun --nproc-per-node 2 -m tiltflow train {out}/config.yaml run.resume=true"
    assert f"stopped at step {step} and saved; go on with: {command}" in said
    assert (out.with_suffix(".logs") / "1.txt").read_text() == ""


def test_a_lost_rank_ends_the_others(server: ForkServerContext, home: Path) -> None:
    out = home / "lost"
    ranks = long_run(server, out, 2)
    began = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert finish(ranks, 60) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    assert (
        "PeerLost: rank 0 of 2 lost another rank"
        in (out.with_suffix(".logs") / "0.txt").read_text()
    )


BROKEN = (
    "rewards={'ranks_worker:broken_now_and_then': {'weight': 1.0, 'options': {'domain': 'points'}}}"
)


def test_non_finite_rewards_stop_or_skip_on_all_ranks_alike(
    server: ForkServerContext, mixture: Callable[..., Path], home: Path
) -> None:
    more = ("train.skip_nonfinite=19", BROKEN, "tilt.kl=0.0")
    runs = [mixture("tilt", size, *more, name="skipping") for size in (1, 2)]
    counts = [[row["skipped"] for row in read_metrics(r / "metrics.jsonl")] for r in runs]
    assert counts[0] == counts[1] and 0 < counts[0][-1] < 20
    assert load_checkpoint(runs[1]).state["skipped"] == counts[1][-1]
    assert gap(*runs) < 1e-5

    arguments = [BROKEN, f"run.out={home / 'broken'}", "train.skip_nonfinite=0"]
    log = home / "broken_logs"
    base = str(runs[0] / "config.yaml")
    assert finish(start(server, 2, ranks_worker.train, base, arguments, log=log)) == [1, 1]
    said = [(log / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert any("gave a non-finite score for '' (row " in text for text in said)
    assert all("not finite" in text or "non-finite" in text for text in said)


def test_a_batch_smaller_than_the_ranks_is_refused(server: ForkServerContext, home: Path) -> None:
    arguments = ["train.batch_size=1", f"run.out={home / 'small'}", "run.device=cpu"]
    log = home / "small_logs"
    base = "mixture_cold_start"
    assert finish(start(server, 2, ranks_worker.train, base, arguments, log=log)) == [1, 1]
    assert "train.batch_size 1 leaves some of 2 ranks no sample" in (log / "0.txt").read_text()


@pytest.mark.long
def test_torchrun_names_a_killed_rank_within_a_minute(tmp_path: Path) -> None:
    job, victim = torchrun(tmp_path)
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    said = (tmp_path / "said.txt").read_text()
    assert time.monotonic() - began < 60
    root = said[said.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root and f"pid: {victim}" in root, said


@pytest.mark.long
def test_killed_at_random_moments_ends_bit_equal(tmp_path: Path) -> None:
    """The fast form of benchmarks/kill_resume.py."""
    script = SRC.parent / "benchmarks" / "kill_resume.py"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    subprocess.run(
        [sys.executable, script, "--kills", "4", "--json", tmp_path / "kills.json"],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == found["bit_equal"] == 4 and found["during_save"] > 0
