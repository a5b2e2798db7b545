"""Runs of the mixture that take a second, for tests of what a term of the loss does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.tasks.train import run_training

SHORT = [
    "run.device=cpu", "train.batch_size=8", "train.steps=4", "checkpoint.every=2", "log.every=1",
    "log.samples_every=0", "watch.rewards={}",
]  # fmt: skip


def cold_start(out: Path) -> Path:
    """A stage 1 in `out`."""
    run_training(load_config("mixture_cold_start", [f"run.out={out}", *SHORT]), Console())
    return out


def tilt(out: Path, cold: Path, *more: str) -> dict[str, Tensor]:
    """The generator's weights after a stage 2 in `out`, from the stage 1 in `cold`."""
    chosen = [f"run.out={out}", f"model.few_step={cold}", *SHORT, "tilt.group_size=4", *more]
    run_training(load_config("mixture_tilt", chosen), Console())
    return dict(load_checkpoint(out).tensors["generator"])
