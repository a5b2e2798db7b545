"""A non-finite number refuses an optimizer step on the device, and the loop hears of it later."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.distributed import Ranks
from tiltflow.core.interruption import pause
from tiltflow.core.metrics import Accumulator, read_metrics
from tiltflow.data.prompts import Prompt
from tiltflow.models.roles import Role, Roles
from tiltflow.training.loop import Hooks, LoopSettings, Skips, train
from tiltflow.training.optim import Attempt, Guard, NonFiniteError, Updater

PROMPTS = [Prompt("a cat"), Prompt("a dog")]
NAN = float("nan")


def role(name: str = "generator") -> Any:
    weights = {"a": torch.nn.Parameter(torch.arange(6.0)), "b": torch.nn.Parameter(torch.ones(2))}
    return Role(name, SimpleNamespace(), torch.nn.Identity(), parameters=weights)


def feed(updater: Updater, step: int, values: tuple[float, float] = (1.0, 1.0)) -> None:
    """One update, of which the loss of each prompt is given."""
    loss = sum(((i + 1) * p.sin()).sum() for i, p in enumerate(updater.parameters))
    updater.watch("the loss", torch.tensor(values), PROMPTS)
    loss.backward()
    updater.apply(step)


def everything(updater: Updater) -> dict[str, torch.Tensor]:
    return {**{k: v.clone() for k, v in updater.role.state().items()}, **updater.state()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("values", [(1.0, NAN), (float("inf"), 1.0)])
def test_a_refused_step_leaves_weights_and_moments_alone(values: tuple[float, float]) -> None:
    made, other = (Updater(role(), lr=0.1, weight_decay=0.1) for _ in range(2))
    for updater in (made, other):
        feed(updater, 0)
    before = everything(made)
    feed(made, 1, values)
    assert equal(everything(made), before)
    for updater in (made, other):
        feed(updater, 2)
    assert equal(everything(made), everything(other)) and not equal(everything(made), before)
    (error,) = made.guard.failures()
    wrong = (0, "inf", "a cat") if values[1] == 1.0 else (1, "nan", "a dog")
    assert str(error) == f"step 1: the loss is {wrong[1]} for the prompt {wrong[2]!r}"
    assert made.guard.failures() == [] and other.guard.failures() == []


def test_a_gradient_that_is_not_finite_refuses_too() -> None:
    updater = Updater(role(), lr=0.1)
    before = everything(updater)
    updater.parameters[0].grad = torch.full((6,), NAN)
    updater.parameters[1].grad = torch.ones(2)
    updater.apply(4)
    after = everything(updater)
    assert all(torch.equal(after[name], before[name]) for name in before)
    (error,) = updater.guard.failures()
    assert str(error).startswith("step 4: the gradient of the generator is not finite")


def test_a_refusal_holds_for_the_rest_of_its_iteration() -> None:
    guard = Guard()
    fake, generator = (Updater(role(n), lr=0.1, guard=guard) for n in ("fake_score", "generator"))
    feed(fake, 0, (NAN, NAN))
    feed(generator, 0)
    assert torch.equal(generator.parameters[1], torch.ones(2)) and float(guard.refused(0)) == 1
    assert guard.refused(1) is None
    feed(fake, 1)
    feed(generator, 1)
    assert not torch.equal(generator.parameters[1], torch.ones(2)) and float(guard.refused(1)) == 0
    assert [str(e)[:7] for e in guard.failures()] == ["step 0:"]


def test_a_refused_average_stays() -> None:
    made = Roles(*(role(name) for name in ("teacher", "generator", "fake_score", "ema")))
    with torch.no_grad():
        made.generator.parameters["a"].fill_(10.0)
    before = {name: p.clone() for name, p in made.ema.state().items()}
    made.update_ema(0.9, torch.tensor(1.0))
    assert equal(made.ema.state(), before)
    made.update_ema(0.9, torch.tensor(0.0))
    assert torch.allclose(made.ema.state()["a"], 0.9 * before["a"] + 1.0)


def test_means_leave_refused_calls_out() -> None:
    sums, no, yes = Accumulator(), torch.tensor(0.0), torch.tensor(1.0)
    sums.add({"loss": torch.tensor(2.0)}, no)
    sums.add({"loss": torch.tensor(NAN), "norm": torch.tensor(NAN)}, yes)
    sums.add({"loss": torch.tensor(4.0)}, no)
    assert sums.means() == {"loss": 3.0}


class Stage:
    """Iterations of which the device refuses the given ones."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self.roles, self.updaters, self.guard, self.bad = self, {}, Guard(), bad

    def iteration(self, step: int) -> dict[str, torch.Tensor]:
        values = torch.tensor([1.0, NAN if step in self.bad else 1.0])
        bad = (~torch.isfinite(values)).sum().float()
        watched = [("the loss", values, PROMPTS)]
        self.guard.add(Attempt(step, "generator", watched, bad, bad))
        return {"loss": values.sum() + step}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"generator": {"w": torch.zeros(1)}}


def run(out: Path, bad: tuple[int, ...], skip: int, save_every: int = 100) -> int:
    settings = LoopSettings(steps=9, log_every=3, save_every=save_every, skip=skip)
    return train(Stage(bad), out, settings, Hooks(), resume=False)


def test_the_loop_counts_refusals_at_its_log_lines(tmp_path: Path) -> None:
    assert run(tmp_path, (1, 5), skip=2) == 9
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 2, 2]
    assert [row["loss"] for row in rows] == [2 + 2 / 2, 2 + 7 / 2, 2 + 7]
    assert load_checkpoint(tmp_path).state["skipped"] == 2


def test_the_loop_stops_before_it_logs_or_saves(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 5: the loss is nan for the prompt 'a dog'"):
        run(tmp_path, (1, 5), skip=1, save_every=7)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3]
    with pytest.raises(NonFiniteError, match="step 3"):
        run(tmp_path / "saving", (3,), skip=0, save_every=4)
    assert latest_step(tmp_path / "saving") is None


class Raising:
    """Two updates an iteration, of which the second raises in its last part at the given steps."""

    def __init__(self, fail: tuple[int, ...], bad: tuple[int, ...] = ()) -> None:
        self.guard, self.fail, self.bad = Guard(), fail, bad
        names = ("fake_score", "generator", "own")
        self.updaters = {n: Updater(role(n), lr=0.1, guard=self.guard) for n in names}

    def iteration(self, step: int) -> dict[str, torch.Tensor]:
        feed(self.updaters["fake_score"], step, (1.0, NAN if step in self.bad else 1.0))
        later = [self.updaters["generator"], self.updaters["own"]]
        for part in range(2):
            for updater in later:
                if part and step in self.fail:
                    raise NonFiniteError(f"step {step}: seen by a term")
                sum((i * p.cos()).sum() for i, p in enumerate(updater.parameters, 1)).backward()
                updater.watch(
                    "the loss", torch.full((2,), NAN if step in self.fail else 1.0), PROMPTS
                )
        return {u.role.name: u.apply(step) for u in later}


def test_a_passed_over_iteration_leaves_nothing_to_the_next() -> None:
    """Neither gradients of what it had not finished, nor values that the next step is refused
    for."""
    made, other, skips = Raising(fail=(1,)), Raising(fail=()), Skips(1)
    assert [bool(skips.iteration(made, step)) for step in range(3)] == [True, False, True]
    for step in (0, 2):
        Skips(0).iteration(other, step)
    skips.settle(made)
    assert skips.count == 1
    for name in ("generator", "own"):
        assert equal(everything(made.updaters[name]), everything(other.updaters[name]))


def test_an_iteration_that_was_refused_and_raised_counts_once() -> None:
    stage, skips = Raising(fail=(1,), bad=(0, 1)), Skips(2)
    for step in range(3):
        skips.iteration(stage, step)
    skips.settle(stage)
    assert skips.count == 2


class Waiting(Stage):
    """Asked to stop while its third iteration waits for a reward server."""

    def iteration(self, step: int) -> dict[str, torch.Tensor]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            pause(30)
        return super().iteration(step)


class Two(Ranks):
    """Rank 0 of two, whose sums are the halves that it holds."""

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("size", [1, 2])
def test_stopped_in_a_wait_no_other_ranks_part_is_taken_for_nothing(
    size: int, tmp_path: Path
) -> None:
    """What rank 0 holds of two iterations is half of their means: the next line is without them."""
    settings = LoopSettings(steps=9, log_every=9, save_every=100)
    done = train(Waiting(()), tmp_path, settings, Hooks(), resume=False, ranks=Two(0, size))
    kept = load_checkpoint(tmp_path).state["since_log"]
    assert done == 2 and kept == ({"loss": [5.0, 2.0]} if size == 1 else {})
