"""Objectives of the forward process: the rollout's end re-noised, its velocity matched by reward.

x_t = (1 − t) x₀ + t n and v = n − x₀, the velocity whose mean given x_t is the sampling policy's;
‖·‖² is the mean over a sample's elements throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.method.policy import clipped_surrogate


def squared_gap(velocity: Tensor, target: Tensor) -> Tensor:
    """‖velocity − target‖², averaged over the elements of a sample: (B,)."""
    return (velocity - target).square().flatten(1).mean(1)


def optimality(advantages: Tensor, scale: float) -> Tensor:
    """r = ½ + ½ clip(A / Z, −1, 1) in [0, 1], `scale` being Z: (B,) (arXiv 2509.16117)."""
    return 0.5 + 0.5 * (advantages / scale).clamp(-1, 1)


def nft_loss(velocity: Tensor, old: Tensor, target: Tensor, r: Tensor, beta: float) -> Tensor:
    """r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖² with v± = v_old ± β (v_θ − v_old): (B,).

    DiffusionNFT (arXiv 2509.16117): v⁺ is drawn to samples of high reward, v⁻, its mirror image at
    the sampling policy, to those of low. `old` carries no gradient.
    """
    step = beta * (velocity - old.detach())
    positive, negative = old.detach() + step, old.detach() - step
    return r * squared_gap(positive, target) + (1 - r) * squared_gap(negative, target)


def awm_loss(
    velocity: Tensor, old: Tensor, target: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    """The clipped surrogate of ratio exp(−‖v_θ − v‖² + ‖v_old − v‖²): (B,).

    Advantage Weighted Matching (arXiv 2509.25050): the matching loss of pretraining stands for the
    sample's log-likelihood, so on the sampling policy the gradient is A ∇‖v_θ − v‖².
    """
    with torch.no_grad():
        before = -squared_gap(old, target)
    return clipped_surrogate(-squared_gap(velocity, target), before, advantages, clip_range)
