"""Rewards that are folders: those that `tiltflow fit-reward` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiltflow.core.disk import parse_json
from tiltflow.core.paths import home_for_tilde

if TYPE_CHECKING:
    from tiltflow.rewards.zoo.votes import FittedReward

FITTED = "reward.json"
"""The file by which a folder is a reward."""


def fitted_folder(name: str) -> Path:
    """The folder that a reward's name would be."""
    return Path(home_for_tilde(name))


def is_fitted(name: str) -> bool:
    """Whether a reward's name is such a folder."""
    return (fitted_folder(name) / FITTED).is_file()


def fitted_clip(folder: Path) -> str | None:
    """The CLIP that such a folder names; None where it does not say, which is an error only when
    it is loaded."""
    try:
        about = parse_json((folder / FITTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    clip = about.get("clip") if isinstance(about, dict) else None
    return clip if isinstance(clip, str) else None


def load_fitted(
    name: str, path: str | None, device: str | torch.device, options: Mapping[str, Any]
) -> FittedReward:
    """The reward of that name.

    Raises:
        ValueError: as `FittedReward`, or if there is a path or an option, which it does not take.
    """
    if path is not None or options:
        raise ValueError(f"reward {name!r} is a folder that says all; it takes no path or option")
    from tiltflow.rewards.zoo.votes import FittedReward

    return FittedReward(str(fitted_folder(name)), device, name)
