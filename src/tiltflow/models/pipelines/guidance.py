"""The two passes of classifier-free guidance, and a model that was distilled to do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.models.backbone import Backbone, Conditioning

Forward = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""One pass: of latents (B, …), levels (B,) and one side of a conditioning."""


def guided_turbo(path: str, backbone: Backbone, asked: float | None, setting: str) -> str | None:
    """A sentence where a model is called Turbo and its guidance (`asked`, None its own) takes a
    pass without the prompt. The files of SD3.5-Large-Turbo and Z-Image-Turbo do not say that they
    are sampled without. The name alone does, and may be another's; so it is said, and no more."""
    place = Path(path)
    of_hub = place.parents[1].name if place.parent.name == "snapshots" else place.name
    guidance = backbone.guidance if asked is None else asked
    if "turbo" not in of_hub.lower() or backbone.passes(guidance) == 1:
        return None
    return (
        f"{path} is called Turbo, as models are that were distilled to be sampled without "
        f"guidance, but its files do not say so: the teacher has guidance {guidance:g}, and "
        f"{setting} leaves it out"
    )


def both_passes(
    forward: Forward,
    x: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    *,
    batched: bool,
    prompts_first: bool,
) -> tuple[Tensor, Tensor]:
    """The velocities (B, …) without and with the prompts.

    `batched` runs them as one batch of twice the size, whose order is the pipeline's own, so that
    roundings are, too.
    """
    sides = (cond.positive, cond.negative) if prompts_first else (cond.negative, cond.positive)
    if batched:
        both = {key: torch.cat([side[key] for side in sides]) for key in cond.positive}
        passes = forward(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        first, second = passes
    else:
        second, first = (forward(x, sigma, side) for side in (cond.positive, cond.negative))
        if prompts_first:
            first, second = second, first
    return (second, first) if prompts_first else (first, second)
