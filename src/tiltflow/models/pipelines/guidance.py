"""The two passes of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tiltflow.models.backbone import Conditioning

Forward = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""One pass: of latents (B, …), levels (B,) and one side of a conditioning."""


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
