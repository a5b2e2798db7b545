"""SubGRPO: the policy gradient of the stochastic steps (METHOD §5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_size: int,
    clip: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages (B,) of B samples in successive groups of one prompt each (METHOD §5).

    Per reward: (r − group mean) / (std over the batch + 1e-4), so that a wide reward does not
    drown a narrow one; then the weighted sum, standardised again and clipped to ±`clip`. A group
    whose members all have the same reward contributes 0 and is counted.

    Raises:
        ValueError: if a reward has another length, or the groups do not fill the batch.
    """
    total: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = rewards[name].float()
        if values.ndim != 1 or len(values) % group_size:
            raise ValueError(f"{len(values)} rewards {name!r} do not fill groups of {group_size}")
        groups = values.view(-1, group_size)
        centred = groups - groups.mean(1, keepdim=True)
        flat = (groups.amax(1) == groups.amin(1)).float()
        # Rounding of a flat group's mean must not pass for a difference.
        centred = centred * (1 - flat)[:, None]
        scaled = centred / (values.std(unbiased=False) + EPSILON)
        metrics[f"policy/flat_groups/{name}"] = flat.mean()
        total = weight * scaled if total is None else total + weight * scaled
    if total is None:
        raise ValueError("advantages need at least one reward")
    flat_total = total.flatten()
    standard = (flat_total - flat_total.mean()) / (flat_total.std(unbiased=False) + EPSILON)
    return standard.clamp(-clip, clip), metrics


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    """−min(ρ A, clip(ρ, 1 ± ε) A) with ρ = exp(log p − log p_old): (B,) (METHOD §5)."""
    ratio = torch.exp(log_prob - old_log_prob.detach())
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def policy_kl(mean: Tensor, reference: Tensor, std: Tensor, convention: str = "unit") -> Tensor:
    """KL of a step to the reference policy's, same std, averaged over elements: (B,).

    Under "unit" (density ∝ exp(−‖x' − mean‖²)) it is ‖Δmean‖²; under "gaussian" ‖Δmean‖²/2std².
    """
    gap = (mean - reference.detach()) ** 2
    if convention == "gaussian":
        gap = gap / (2 * std**2)
    return gap.flatten(1).mean(1)


def choose_steps(order: Tensor, subset: int) -> tuple[int, ...]:
    """The trained steps: the first `subset` of a permutation of the stochastic steps, sorted."""
    return tuple(sorted(int(k) for k in order[:subset]))


def share_in_groups(noise: Tensor, group_size: int) -> Tensor:
    """Every member of a group gets its first member's noise: (B, ...) (METHOD §5)."""
    return noise[::group_size].repeat_interleave(group_size, 0)
