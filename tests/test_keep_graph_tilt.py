"""The graphs of the rollout's steps, kept for the generator's update (`tilt.keep_graph`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_keep_graph import calls, weights
from test_planning import fixed

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.distributed import ALONE
from tiltflow.setup.build import build_stage
from tiltflow.setup.planner import GIB, OVERHEAD, Plan
from tiltflow.tasks import planning
from tiltflow.tasks.planning import chosen, with_graphs
from tiltflow.tasks.train import run_training
from tiltflow.training.tilt import Tilt

Tiny = Callable[[str], Path]


def stage(tmp_path: Path, keep: bool, *more: str) -> Tilt:
    values = [
        "run.device=cpu", f"run.out={tmp_path / 'tilt'}", f"model.few_step={tmp_path / 'few'}",
        "train.batch_size=8", "tilt.group_size=4", "train.generator_lr=1e-3",
        "train.fake_score_lr=1e-3", f"tilt.keep_graph={str(keep).lower()}", *more,
    ]  # fmt: skip
    made = build_stage(load_config("mixture_tilt", values)).stage
    assert isinstance(made, Tilt)
    return made


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A stage-1 run of the mixture, of one step."""

    values = [f"run.out={tmp_path / 'few'}", "run.device=cpu", "train.steps=1",
              "train.batch_size=4", "checkpoint.every=1"]  # fmt: skip
    run_training(load_config("mixture_cold_start", values), Console(quiet=True))
    return tmp_path


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("tilt.match_steps=last", "train.micro_batch_size=2"),
        ("tilt.match_steps=random", "tilt.drop_zero_advantages=true", "tilt.log_prob=gaussian"),
        ("tilt.reward_weight=0", "tilt.subset=1", "tilt.match_steps=all"),
    ],
)
def test_it_is_the_same_epoch_bit_for_bit(few: Path, more: tuple[str, ...]) -> None:
    kept, again = stage(few, True, *more), stage(few, False, *more)
    before = weights(kept)  # type: ignore[arg-type]
    for step in range(3):
        found, expected = kept.iteration(step), again.iteration(step)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    found, expected = weights(kept), weights(again)  # type: ignore[arg-type]
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    moved = {name.partition(".")[0] for name in found if not torch.equal(found[name], before[name])}
    assert {"generator", "fake_score", "ema"} <= moved


def test_it_is_a_pass_less_for_each_step(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four steps two are trained and the last is matched: three run once in place of twice."""
    more = ("tilt.match_steps=last",)
    kept = calls(stage(few, True, *more), 2, monkeypatch)  # type: ignore[arg-type]
    again = calls(stage(few, False, *more), 2, monkeypatch)  # type: ignore[arg-type]
    assert again["generator"] == 8 and again["generator+"] == kept["generator+"] == 6
    assert kept["generator"] == 2


def gradient(of: Tilt, step: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the generator's optimizer step of an epoch is given."""
    found: list[torch.Tensor] = []
    apply = of.updater.apply

    def seen(step: int) -> torch.Tensor:
        found.extend(p.grad.clone() for p in of.updater.parameters if p.grad is not None)
        return apply(step)

    monkeypatch.setattr(of.updater, "apply", seen)
    of.iteration(step)
    return found


@pytest.mark.parametrize(
    "more",
    [
        ("tilt.match_steps=last",),
        ("tilt.match_steps=random", "tilt.reward_normalise=true", "train.micro_batch_size=2"),
        ("tilt.reward_normalise=true", "tilt.drop_zero_advantages=true", "tilt.match_steps=all"),
    ],
)
def test_the_reward_goes_back_through_several_kept_steps(
    few: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """The sum is the same in another order; steps that another term looks at are gone back through
    twice, and no gradient of that term goes on to the step before."""
    common = ("tilt.reward_steps=3", "tilt.subset=1", "tilt.reward_weight=0.1", *more)
    kept, again = stage(few, True, *common), stage(few, False, *common)
    found, expected = (gradient(one, 0, monkeypatch) for one in (kept, again))
    assert len(found) == len(expected) > 0
    assert any(bool(value.any()) for value in expected)
    for value, known in zip(found, expected, strict=True):
        torch.testing.assert_close(value, known, rtol=1e-4, atol=1e-6 * float(known.abs().max()))


def test_several_kept_steps_run_once(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four passes an epoch in place of nine: the rollout's, one each of policy and matching, and
    three of the reward's."""
    more = ("tilt.reward_steps=3", "tilt.subset=1", "tilt.match_steps=last")
    kept = calls(stage(few, True, *more), 2, monkeypatch)  # type: ignore[arg-type]
    again = calls(stage(few, False, *more), 2, monkeypatch)  # type: ignore[arg-type]
    assert again["generator"] == 8 and again["generator+"] == 10
    assert kept.get("generator", 0) == 0 and kept["generator+"] == 8


def auto() -> RunConfig:
    values = ["model.gradient_checkpointing=auto", "tilt.keep_graph=auto", "data.prompts=x",
              "run.out=x", "rewards={shapes: 1.0}", "model.few_step=y"]  # fmt: skip
    return load_config("sd35m_tilt", values)


def planned(cfg: RunConfig) -> Plan:
    return Plan({"base weights": GIB}, {"iteration": 8 * GIB if cfg.tilt.keep_graph else GIB}, 0)


def memory(gib: float) -> float:
    return gib * GIB + OVERHEAD


@pytest.mark.parametrize(("gib", "keep"), [(12, True), (6, False)])
def test_auto_keeps_them_where_the_plan_fits(gib: float, keep: bool) -> None:
    cfg = auto()
    made = planned(planning.with_checkpointing(cfg, ("decoder",)))
    found, plan = with_graphs(cfg, ("decoder",), made, memory(gib), planned)
    assert found.model.checkpointed == {"decoder"} and found.tilt.keep_graph is keep
    assert plan is not None and plan.peak == (9 if keep else 2) * GIB


def test_a_run_keeps_whether_it_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Plans", fixed(planned))
    said: list[str] = []

    def at(gib: float, goes_on: bool) -> bool | str:
        made = chosen(auto(), tmp_path, goes_on, memory(gib), ALONE, said.append)
        return made.tilt.keep_graph

    assert at(6, False) is False and at(100, True) is False
    assert said[0].startswith("gradient_checkpointing=auto recomputes nothing: ")
    assert at(12, False) is True and at(12, True) is True
    assert said[1].startswith(
        "gradient_checkpointing=auto recomputes nothing and keeps the rollout"
    )
