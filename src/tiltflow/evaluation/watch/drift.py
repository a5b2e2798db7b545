"""Drift from the teacher: how badly its velocity fits the generator's samples, re-noised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltflow.flow import interpolate

Field = Callable[[Tensor, Tensor], Tensor]
"""(x, σ) → v with the conditioning closed over."""
FLOOR = 1e-8
"""Added before the logarithm, for a sample that the teacher predicts exactly."""


@torch.no_grad()
def log_velocity_gap(
    x0: Tensor, levels: Sequence[float], noises: Sequence[Tensor], teacher: Field
) -> Tensor:
    """Mean over `levels` of log(mean over elements of (v_ψ(x_t, t) − (n − x0))²): (B,) fp32.

    x_t = (1−t) x0 + t n lies on the straight path from the sample x0 to its noise n, whose velocity
    is n − x0. Over samples x0 of p, the mean square is E‖v_ψ − v_p‖² + E Var(n − x0 given x_t):
    the velocity gap of METHOD §3's divergence, KL(p ‖ p_ψ) = ∫ (1−t)/t E‖v_p − v_ψ‖² dt, plus a
    spread that falls as p collapses. No model of p is needed. `noises` holds one n of x0's shape a
    level; the logarithm makes all levels count alike.
    """
    total = x0.new_zeros(len(x0), dtype=torch.float32)
    for level, noise in zip(levels, noises, strict=True):
        t = x0.new_full((len(x0),), level, dtype=torch.float32)
        n = noise.to(x0)
        gap = teacher(interpolate(x0, n, t), t) - (n - x0)
        total += torch.log((gap.float() ** 2).flatten(1).mean(1) + FLOOR)
    return total / len(levels)
