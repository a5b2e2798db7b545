"""Rewards that compute elsewhere: training goes on meanwhile, and comes to the same."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from test_train import QUIET, recipe
from tiny_pipelines import build

from tiltflow.config.load import load_config
from tiltflow.core.background import Background
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.rewards.base import FunctionReward, load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted
from tiltflow.tasks.train import run_training
from tiltflow.training.optim import Updater
from tiltflow.training.updates import FakeScoreTrainer

WAIT = 20.0  # seconds after which a reward that waits in vain fails


def test_calls_are_made_one_by_one_in_their_order() -> None:
    thread, seen = Background("test"), []
    futures = [thread.call(lambda i=i: seen.append(i) or -i) for i in range(20)]
    assert [f.result(WAIT) for f in futures] == [-i for i in range(20)]
    assert seen == list(range(20))
    thread.close()


def test_an_error_is_in_the_future_and_the_thread_lives_on() -> None:
    thread = Background("test")
    wrong, right = thread.call(int, "x"), thread.call(int, "7")
    with pytest.raises(ValueError, match="'x'"):
        wrong.result(WAIT)
    assert right.result(WAIT) == 7
    thread.close()


def test_a_closed_thread_finishes_its_call_and_makes_no_more() -> None:
    thread, begun, go = Background("test"), threading.Event(), threading.Event()

    def first() -> str:
        begun.set()
        assert go.wait(WAIT)
        return "done"

    now, later = thread.call(first), thread.call(str)
    assert begun.wait(WAIT)
    thread.close()
    go.set()
    assert now.result(WAIT) == "done"
    with pytest.raises(CancelledError):
        later.result(WAIT)


ACCUMULATED = threading.Event()
TOGETHER = threading.Barrier(2)


def patient(images, prompts, metadata):
    """Scores once the gradient of a fake-score update is there."""
    if not ACCUMULATED.wait(WAIT):
        raise RuntimeError("no fake-score gradient was computed meanwhile")
    return images.mean((1, 2, 3))


def one(images, prompts, metadata):
    TOGETHER.wait(WAIT)
    return images.amax((1, 2, 3))


def other(images, prompts, metadata):
    TOGETHER.wait(WAIT)
    return images.amin((1, 2, 3))


def failing(images, prompts, metadata):
    raise ValueError("the service is shut")


def not_a_number(images, prompts, metadata):
    return images.mean((1, 2, 3)) * float("nan")


for function in (patient, one, other, failing, not_a_number):
    function.elsewhere = True  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A pipeline, prompts and a stage-1 run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pipeline, prompts = build("sd35m", folder / "sd35m"), folder / "prompts.txt"
    prompts.write_text("a cat\na dog\na red bird\n")
    chosen = recipe("cold_start", pipeline, prompts, folder / "cold", "train.steps=1")
    run_training(load_config("demo_cold_start", chosen), QUIET)
    return pipeline, prompts, folder / "cold"


def tilt(places: tuple[Path, Path, Path], out: Path, rewards: dict[str, dict]) -> Path:
    pipeline, prompts, cold = places
    named = {f"test_elsewhere:{name}": settings for name, settings in rewards.items()}
    chosen = recipe(
        "tilt", pipeline, prompts, out, f"model.few_step={cold}", "train.steps=2",
        "log.samples_every=0", "checkpoint.every=1", "tilt.decode_chunk=2", f"rewards={named}",
    )  # fmt: skip
    return run_training(load_config("demo_tilt", chosen), QUIET)


@pytest.mark.long
def test_the_fake_score_learns_while_a_reward_elsewhere_scores(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is trained is what a reward in this process trains, bit by bit."""
    real = FakeScoreTrainer.accumulate

    def told(*args, **kwargs):
        metrics = real(*args, **kwargs)
        ACCUMULATED.set()
        return metrics

    ACCUMULATED.clear()
    monkeypatch.setattr(FakeScoreTrainer, "accumulate", told)
    away = tilt(places, tmp_path / "away", {"patient": {"weight": 1.0}})
    here = {"weight": 1.0, "options": {"elsewhere": False}}
    near = tilt(places, tmp_path / "near", {"patient": here})
    a, b = load_checkpoint(away), load_checkpoint(near)
    for group, table in a.tensors.items():
        assert all(torch.equal(value, b.tensors[group][key]) for key, value in table.items())
    assert read_metrics(away / "metrics.jsonl") == read_metrics(near / "metrics.jsonl")


def test_rewards_elsewhere_score_side_by_side(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Each waits for the other: one after another they would wait in vain."""
    out = tilt(places, tmp_path / "run", {"one": {"weight": 1.0}, "other": {"weight": 1.0}})
    (*_, row) = read_metrics(out / "metrics.jsonl")
    assert row["reward/test_elsewhere:one"] > row["reward/test_elsewhere:other"]


@pytest.mark.parametrize(("name", "says"), [("failing", "is shut"), ("not_a_number", "non-finite")])
def test_a_failure_elsewhere_stops_the_run_before_anything_changed(
    name: str,
    says: str,
    places: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied, dropped = [], []
    apply, drop = Updater.apply, Updater.drop
    monkeypatch.setattr(Updater, "apply", lambda *a: applied.append(a) or apply(*a))
    monkeypatch.setattr(Updater, "drop", lambda self: dropped.append(self) or drop(self))
    with pytest.raises(ValueError, match=f"test_elsewhere:{name}.*{says}"):
        tilt(places, tmp_path / "run", {name: {"weight": 1.0}})
    assert not applied
    assert dropped
    assert all(p.grad is None for updater in dropped for p in updater.parameters)


def test_a_reward_elsewhere_is_not_differentiable() -> None:
    with pytest.raises(ValueError, match="'mine': elsewhere, so it cannot be differentiable"):
        FunctionReward(patient, "mine", differentiable=True, elsewhere=True)


def test_a_mixture_knows_which_rewards_are_elsewhere() -> None:
    away = Weighted(load_reward("test_elsewhere:patient"))
    near = Weighted(load_reward("shapes"), 2.0)
    mixture = RewardMixture([away, near])
    assert mixture.elsewhere == (away,)
    assert mixture.here is not None and mixture.here.weights == {"shapes": 2.0}
    assert RewardMixture([away]).here is None
