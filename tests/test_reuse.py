"""Rollouts that serve several iterations, and the states that a rollout keeps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tiltflow.config.load import load_config
from tiltflow.method.rollout import join, rollout
from tiltflow.setup.build import build_stage
from tiltflow.training import updates
from tiltflow.training.cold_start import ColdStart, Cycle


@pytest.mark.parametrize(("reuse", "every"), [(1, 10), (4, 10), (4, 4), (2, 2), (3, 8), (4, 3)])
def test_cycles_partition_the_iterations_and_end_at_the_generators_update(
    reuse: int, every: int
) -> None:
    cycles = [Cycle.of(step, reuse, every) for step in range(5 * every)]
    distinct = sorted(set(cycles), key=lambda cycle: cycle.first)
    assert [c.number for c in distinct] == list(range(len(distinct)))
    covered = [step for c in distinct for step in range(c.first, c.first + c.length)]
    assert covered == list(range(5 * every))
    assert all(step in range(c.first, c.first + c.length) for step, c in enumerate(cycles))
    ends = {c.first + c.length for c in distinct}
    assert {every * (window + 1) for window in range(5)} <= ends
    assert max(c.length for c in distinct) == min(reuse, every)


def stage(tmp_path: Path, *more: str) -> ColdStart:
    arguments = ["run.device=cpu", f"run.out={tmp_path}", "train.batch_size=6", *more]
    made = build_stage(load_config("mixture_cold_start", arguments)).stage
    assert isinstance(made, ColdStart)
    return made


def test_one_rollout_serves_every_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(tmp_path, "cold_start.reuse=4", "cold_start.generator_every=10")
    rollouts, levels = [], []
    real_rollout, real_update = updates.rollout, type(made.fake).accumulate

    def counted(*args, **kwargs):
        rollouts.append(kwargs["stop"])
        return real_rollout(*args, **kwargs)

    def seen(self, draw, at):
        levels.append(round(float(at.s[0]), 6))
        return real_update(self, draw, at)

    monkeypatch.setattr(updates, "rollout", counted)
    monkeypatch.setattr(type(made.fake), "accumulate", seen)
    for step in range(100):
        made.iteration(step)
    assert len(rollouts) == 30 and all(stop == 4 for stop in rollouts[0::3])
    grid = {round(float(s), 6) for s in made.sigmas[1:]}
    for window in range(10):
        mine = levels[10 * window : 10 * window + 10]
        assert set(mine[:4]) == set(mine[4:8]) == grid and len(set(mine[8:])) == 2
    counts = Counter(levels[9::10])  # what the generator's updates match at
    assert set(counts) <= grid and len(counts) > 1


def test_a_shared_rollout_holds_the_boundaries_and_nothing_else(tmp_path: Path) -> None:
    made = stage(tmp_path, "cold_start.reuse=2", "cold_start.generator_every=2")
    made.iteration(0)
    ((trajectory, _),) = made._held.values()
    stops = made.stops(Cycle.of(0, 2, 2))
    assert set(trajectory.states) == {*stops, stops[-1] - 1}
    made.iteration(1)
    assert not made._held


def test_states_that_are_not_kept_change_nothing() -> None:
    sigmas, n = torch.tensor([1.0, 0.75, 0.5, 0.0]), 5
    noise = torch.randn(4, n, 2, generator=torch.Generator().manual_seed(0))

    def run(**options):
        return rollout(
            lambda x, sigma, cond: 0.3 * x, noise[3], sigmas, None, 0.9, noise.__getitem__,
            record=(1,), **options,
        )  # fmt: skip

    whole, part = run(), run(keep={1})
    assert set(whole.states) == {0, 1, 2, 3} and set(part.states) == {1, 3} and part.steps == 3
    assert all(torch.equal(part.states[k], whole.states[k]) for k in (1, 3))
    assert torch.equal(part.end, whole.end) and torch.equal(part.log_probs[1], whole.log_probs[1])
    assert set(run(stop=2, keep=()).states) == {2}
    joined = join([part, part], None)
    assert set(joined.states) == {1, 3} and joined.end.shape == (2 * n, 2)
    with pytest.raises(ValueError, match="deterministic step"):
        rollout(
            lambda x, sigma, cond: x, noise[3], sigmas, None, 0.9, noise.__getitem__,
            record=(2,), convention="gaussian",
        )  # fmt: skip


def test_more_reuse_than_boundaries_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cold_start.reuse 5 is more than the 4 boundaries"):
        load_config("mixture_cold_start", ["cold_start.reuse=5"])
