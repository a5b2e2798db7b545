"""What the tests of the backbones share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import BUILDERS, RESOLUTION, TOKENS
from torch import Tensor

from tiltflow.models.families import load_backbone

Tiny = Callable[[str], Path]
PROMPTS = ["a red cat", "two dogs"]
BEGINNINGS = {"sd3": "sd3", "flux": "flux", "klein": "flux2", "z_image": "z_image"}
FAMILY = {name: next(BEGINNINGS[b] for b in BEGINNINGS if name.startswith(b)) for name in BUILDERS}


def load(path: Path, **options: Any) -> Any:
    options = {"resolution": RESOLUTION, "max_sequence_length": TOKENS} | options
    return load_backbone(path, device="cpu", **options)


@cache
def shared(path: Path) -> Any:
    """The backbone of a directory, for tests that leave it as it is."""
    return load(path)


def noise(backbone: Any, batch: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *backbone.latent_shape, generator=generator)
