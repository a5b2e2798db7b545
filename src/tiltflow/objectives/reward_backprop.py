"""Reward back-propagation through the deterministic last step (METHOD §5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def reward_gradient(
    x0: Tensor,
    decode: Callable[[Tensor], Tensor],
    reward: Callable[[Tensor, slice], Tensor],
    target: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Loss relu(target − R) per sample (B,) and its gradient with respect to x̂₀ (B, ...).

    `decode` maps latents to images, `reward(images, rows)` gives R = Σ w r (B,) of those rows.
    Each chunk's graph (decoder and reward models) is freed before the next is built, so memory is
    one chunk's whatever the batch; the caller carries the gradient on into the generator.
    """
    losses, gradients = [], []
    for rows in _chunks(len(x0), chunk):
        leaf = x0[rows].detach().requires_grad_(True)
        with torch.enable_grad():
            loss = torch.relu(target - reward(decode(leaf), rows))
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        losses.append(loss.detach())
        gradients.append(gradient)
    return torch.cat(losses), torch.cat(gradients)


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
