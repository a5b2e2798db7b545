"""SubGRPO: the policy gradient of the stochastic steps (METHOD §5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_size: int,
    clip: float = 5.0,
    labels: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages (B,) of B samples in successive groups of one prompt each (METHOD §5).

    Per reward: (r − group mean) / (std over the batch + 1e-4), so that a wide reward does not
    drown a narrow one; then the weighted sum, standardised again and clipped to ±`clip`. A group
    whose members all have the same reward contributes 0 and is counted. `labels` has a number a
    group: groups of one number have their mean together, as where two have the same prompt.

    Raises:
        ValueError: if a reward has another length, or the groups do not fill the batch.
    """
    total, metrics = _weighted_sum(rewards, weights, group_size, labels)
    standard = (total - total.mean()) / (total.std(unbiased=False) + EPSILON)
    return standard.clamp(-clip, clip), metrics


def standing_out(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_size: int,
    labels: Sequence[int] | None = None,
) -> Tensor:
    """1 for samples that differ from their group's mean in some reward, else 0: (B,).

    Judged before the sum is standardised over the batch, which moves an exact 0 by a rounding.
    Where no sample stands out all count, so that the terms without advantages go on.
    """
    total, _ = _weighted_sum(rewards, weights, group_size, labels)
    found = (total != 0).float()
    return torch.where(found.sum() > 0, found, torch.ones_like(found))


def _weighted_sum(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_size: int,
    labels: Sequence[int] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w (r − group mean) / (std + 1e-4) of every sample (B,), and each reward's flat groups."""
    total: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = rewards[name].float()
        if values.ndim != 1 or len(values) % group_size:
            raise ValueError(f"{len(values)} rewards {name!r} do not fill groups of {group_size}")
        groups = values.view(-1, group_size)
        mean, high, low = _of_label(groups, labels)
        centred = groups - mean[:, None]
        flat = (high == low).float()
        # Rounding of a flat group's mean must not pass for a difference.
        centred = centred * (1 - flat)[:, None]
        scaled = centred / (values.std(unbiased=False) + EPSILON)
        metrics[f"policy/flat_groups/{name}"] = flat.mean()
        total = weight * scaled if total is None else total + weight * scaled
    if total is None:
        raise ValueError("advantages need at least one reward")
    return total.flatten(), metrics


def _of_label(groups: Tensor, labels: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, greatest and least of each group (n, G), or of all that share its label: (n,)."""
    each = groups.mean(1), groups.amax(1), groups.amin(1)
    if labels is None:
        return each
    if len(labels) != len(groups):
        raise ValueError(f"{len(labels)} labels are given for {len(groups)} groups")
    at = torch.as_tensor(labels, device=groups.device)
    same = at[:, None] == at
    count = same.sum(1)
    mean = torch.where(same, each[0], 0).sum(1) / count
    high = torch.where(same, each[1], -torch.inf).amax(1)
    low = torch.where(same, each[2], torch.inf).amin(1)
    return mean, high, low


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


def window_steps(epoch: int, steps: int, size: int, every: int) -> tuple[int, ...]:
    """The trained steps as a window of `size` successive ones out of 0 … `steps` − 1, which moves
    on by one each `every` epochs, and from the end back to the first (MixGRPO, arXiv 2507.21802).
    """
    size = min(size, steps)
    first = epoch // every % (steps - size + 1)
    return tuple(range(first, first + size))


def share_in_groups(noise: Tensor, group_size: int) -> Tensor:
    """Every member of a group gets its first member's noise: (B, ...) (METHOD §5)."""
    return noise[::group_size].repeat_interleave(group_size, 0)
