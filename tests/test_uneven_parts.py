"""A batch that micro-batches do not divide: the last part is shorter, and the gradient the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.setup.build import build_stage
from tiltflow.tasks.train import run_training

COMMON = ("run.device=cpu", "train.generator_lr=1e-3", "train.fake_score_lr=1e-3")


def after(recipe: str, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """Metrics of one iteration, and Adam's first moments: then the gradients times 1 − β₁.

    (Weights tell less: Adam divides each gradient by its own size, rounding errors too.)
    """
    made = build_stage(load_config(recipe, [*COMMON, f"run.out={out}", *more])).stage
    found = {f"metric.{name}": value for name, value in made.iteration(0).items()}
    for role, updater in made.updaters.items():
        found |= {f"{role}.{n}": v.clone() for n, v in updater.state().items() if "exp_avg." in n}
    return found


def same(whole: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> None:
    """To the order of summation; and that there is something to compare."""
    assert whole.keys() == parts.keys()
    for role in ("generator", "fake_score"):
        gradients = [value for name, value in whole.items() if name.startswith(f"{role}.")]
        assert gradients and all(bool((value != 0).any()) for value in gradients)
    for name, value in whole.items():
        near = 1e-5 * float(value.abs().max())
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=near, msg=name)


@pytest.mark.parametrize("micro", [3, 4, 6])
@pytest.mark.parametrize("keep", ["true", "false"])
def test_stage_1_with_a_shorter_last_part_is_the_same(
    tmp_path: Path, micro: int, keep: str
) -> None:
    batch = ("train.batch_size=7", "cold_start.generator_every=1", f"cold_start.keep_graph={keep}")
    whole = after("mixture_cold_start", tmp_path, *batch)
    parts = after("mixture_cold_start", tmp_path, *batch, f"train.micro_batch_size={micro}")
    same(whole, parts)


def test_stage_2_with_whole_groups_and_a_shorter_last_part_is_the_same(tmp_path: Path) -> None:
    cold = load_config(
        "mixture_cold_start",
        [*COMMON, f"run.out={tmp_path / 'cold'}", "train.steps=2", "train.batch_size=8"],
    )
    run_training(cold, Console(quiet=True))
    batch = ("train.batch_size=12", "tilt.group_size=4", f"model.few_step={tmp_path / 'cold'}")
    whole = after("mixture_tilt", tmp_path, *batch, "train.micro_batch_size=12")
    parts = after("mixture_tilt", tmp_path, *batch, "train.micro_batch_size=8")
    same(whole, parts)
