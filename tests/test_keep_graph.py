"""The graph of the generator's step, kept while the fake score learns (`cold_start.keep_graph`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.models.roles import Role
from tiltflow.setup.build import build_stage
from tiltflow.training.cold_start import ColdStart, Cycle

SETTINGS = (
    "run.device=cpu", "train.batch_size=6", "train.generator_lr=1e-3",
    "train.fake_score_lr=1e-3", "train.boundary_power=1.0",
)  # fmt: skip


def stage(out: Path, keep: bool, *more: str) -> ColdStart:
    arguments = [*SETTINGS, f"run.out={out}", f"cold_start.keep_graph={str(keep).lower()}", *more]
    made = build_stage(load_config("mixture_cold_start", arguments)).stage
    assert isinstance(made, ColdStart)
    return made


def weights(made: ColdStart) -> dict[str, Tensor]:
    state = made.roles.state()
    return {f"{r}.{n}": value.clone() for r, of in state.items() for n, value in of.items()}


@pytest.mark.parametrize("more", [(), ("train.micro_batch_size=2",), ("sampler.eta=0.0",)])
@pytest.mark.parametrize(("reuse", "every"), [(1, 1), (1, 3), (2, 2), (4, 10), (3, 4)])
def test_it_is_the_same_iteration(
    tmp_path: Path, reuse: int, every: int, more: tuple[str, ...]
) -> None:
    options = [f"cold_start.reuse={reuse}", f"cold_start.generator_every={every}", *more]
    kept, again = stage(tmp_path, True, *options), stage(tmp_path, False, *options)
    before = weights(kept)
    for step in range(2 * every + 2):
        found, expected = kept.iteration(step), again.iteration(step)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    found, expected = weights(kept), weights(again)
    moved = {name.partition(".")[0] for name in found if not torch.equal(found[name], before[name])}
    assert moved == {"generator", "fake_score", "ema"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def calls(made: ColdStart, steps: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each role was called by `steps` iterations, with a graph (+) or without."""
    counted: Counter[str] = Counter()
    real = Role.__call__

    def call(self: Role, x: Tensor, *args, **kwargs) -> Tensor:
        counted[self.name + "+" * torch.is_grad_enabled()] += 1
        return real(self, x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Role, "__call__", call)
        for step in range(steps):
            made.iteration(step)
    return counted


def test_it_is_a_pass_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, every = 12, "cold_start.generator_every=1"
    again = calls(stage(tmp_path, False, every), steps, monkeypatch)
    kept = calls(stage(tmp_path, True, every), steps, monkeypatch)
    assert again - kept == Counter({"generator": steps})
    assert kept["generator+"] == kept["teacher"] == steps


@pytest.mark.parametrize(("reuse", "every"), [(1, 1), (2, 2), (4, 10), (3, 4)])
def test_a_rollout_ends_before_the_step_that_is_made_later(
    tmp_path: Path, reuse: int, every: int
) -> None:
    made = stage(tmp_path, True, f"cold_start.reuse={reuse}", f"cold_start.generator_every={every}")
    for step in range(4 * every):
        cycle = Cycle.of(step, reuse, every)
        *others, end = made.stops(cycle)
        trajectory, _ = made._rollout(cycle)
        updates = (cycle.first + cycle.length) % every == 0
        assert set(trajectory.states) == {*others, end - 1} | (set() if updates else {end})
        made.iteration(step)
    assert not made._held
