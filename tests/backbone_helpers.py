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
FAMILY = {name: "sd3" if name.startswith("sd3") else "flux" for name in BUILDERS}
FAMILY |= {"klein": "flux2", "klein_base": "flux2"}


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
