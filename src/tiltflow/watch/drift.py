"""Drift from the teacher: the velocity gap at re-noised samples of the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltflow.flow import interpolate

Field = Callable[[Tensor, Tensor], Tensor]
"""(x, σ) → v with the conditioning closed over."""


@torch.no_grad()
def velocity_gap(
    x0: Tensor, levels: Sequence[float], noises: Sequence[Tensor], teacher: Field, fake_score: Field
) -> Tensor:
    """Mean over `levels` and elements of (v_teacher − v_fake)² at x_t = (1−t) x0 + t n: (B,) fp32.

    With p the generator's distribution and q the teacher's, of velocities v_p and v_q,

        KL(p ‖ q) = ∫₀¹ (1−t)/t · E‖v_p − v_q‖² dt,   the expectation over x_t of p,

    (from s = −(x + (1−t) v)/t for the score s, and the divergence as an integral of squared score
    gaps along the forward process), so this is the integrand of the divergence that METHOD §3
    holds down, at fixed levels, with the fake score in the place of v_p, which no one knows. It is
    as good as the fake score is: one that lags behind the generator shows the drift late.

    `noises` holds one n of x0's shape a level.
    """
    total = x0.new_zeros(len(x0), dtype=torch.float32)
    for level, noise in zip(levels, noises, strict=True):
        t = x0.new_full((len(x0),), level, dtype=torch.float32)
        x_t = interpolate(x0, noise.to(x0), t)
        gap = teacher(x_t, t) - fake_score(x_t, t)
        total += (gap.float() ** 2).flatten(1).mean(1)
    return total / len(levels)
