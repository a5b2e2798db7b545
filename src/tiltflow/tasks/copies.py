"""Students that are networks of their own, of a family without files: out of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tiltflow.core.checkpoint import Checkpoint, load_checkpoint
from tiltflow.models.families import load_backbone
from tiltflow.models.roles import Role
from tiltflow.tasks.choices import DEFAULTS, OPTIONS, Choices
from tiltflow.tasks.systems import Loaded


def checkpoints_of(few_step: Path, tilt: Path | None) -> dict[str, Checkpoint]:
    """The latest checkpoints of a stage-1 run and of a stage-2 run, by their student's name.

    Raises:
        ValueError: if a directory holds no whole checkpoint, or one of adapters.
    """
    found = {}
    for name, run in (("ac_dmd", few_step), ("rtdmd", tilt)):
        if run is not None:
            found[name] = load_checkpoint(run, tidy=False)
            if found[name].state.get("adapters"):
                raise ValueError(f"{run} trained adapters, whose base this model is not")
    return found


def settle_copies(asked: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint]) -> Choices:
    """What to sample with: what is asked for, else as the last student was trained: with the most
    of its steps."""
    trained = dict(list(checkpoints.values())[-1].state)
    if isinstance(trained.get("steps"), list):
        trained["steps"] = trained["steps"][-1]
    values: dict[str, Any] = {
        key: trained.get(key, DEFAULTS.get(key)) if asked.get(key) is None else asked[key]
        for key in OPTIONS
    }
    return Choices(**values, dtype="fp32")


def load_copies(family: str, checkpoints: Mapping[str, Checkpoint], device: torch.device) -> Loaded:
    """The family's teacher, and the students with the EMA's weights of their checkpoints.

    Raises:
        ValueError: if the weights are another network's.
    """
    backbone = load_backbone(None, family=family, device=device)
    students = {}
    for name, checkpoint in checkpoints.items():
        network = backbone.new_copy("student", 0).requires_grad_(False)
        students[name] = Role(name, backbone, network, parameters=dict(network.named_parameters()))
        students[name].load(checkpoint.tensors["ema"])
    return Loaded(backbone, Role("teacher", backbone, backbone.teacher_base), students)
