"""Reward back-propagation through the deterministic last step (METHOD §5)."""

from __future__ import annotations

import math
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


EPSILON = 1e-12


def equal_norm(x0: Tensor) -> float:
    """1/√n, the norm of a gradient whose n elements (of one sample of x̂₀ (B, ...)) are 1/n."""
    return 1 / math.sqrt(x0[0].numel())


def in_equal_parts(gradient: Tensor) -> Tensor:
    """Each sample's gradient (B, ...) at `equal_norm`, as that of the matching loss has if its
    elements are 1 before the mean: (B, ...); a zero gradient stays zero.

    Rewards have heavy-tailed gradients: samples at the edge between right and wrong have many times
    those of the others, and a batch's sum is theirs. Here every sample has the same say, and the
    weight counts against the matching loss's whatever the reward's scale and the latent's size.
    """
    scale = equal_norm(gradient) / (gradient.flatten(1).norm(dim=1) + EPSILON)
    return gradient * scale.view(-1, *[1] * (gradient.ndim - 1))


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
