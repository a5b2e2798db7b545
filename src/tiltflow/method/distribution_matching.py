"""The AC-DMD generator gradient (METHOD §4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiltflow.flow import cps_step, renoise

Field = Callable[[Tensor, Tensor], Tensor]
"""v(x, σ) with the conditioning closed over."""

Draws = tuple[Tensor, Tensor, Tensor]
"""Levels t (B,), and the noises of the re-noising and of the way back, of the latent's shape."""

EPSILON = 1e-6


@torch.no_grad()
def matching_gradient(
    x_s: Tensor,
    s: Tensor,
    t: Tensor,
    noise: Tensor,
    z: Tensor,
    teacher: Field,
    fake_score: Field,
    eta: float,
) -> Tensor:
    """g = (x_s^φ − x_s^ψ) / (mean|x_s − x_s^ψ| + 1e-6), shape of `x_s` (METHOD §4).

    x_s (B, ...) at levels `s` is re-noised to `t` with `noise`; teacher (guided) and fake score
    each take one CPS transition back to `s` with the same `z`. The mean is per sample. Descending
    along g moves the generator's distribution towards the teacher's.
    """
    x_s = x_s.detach()
    x_t = renoise(x_s, s, t, noise)
    from_teacher = cps_step(x_t, teacher(x_t, t), t, s, eta, z)
    from_fake = cps_step(x_t, fake_score(x_t, t), t, s, eta, z)
    scale = (x_s - from_teacher).abs().flatten(1).mean(1) + EPSILON
    return (from_fake - from_teacher) / scale.view(-1, *([1] * (x_s.ndim - 1)))


def decoupled_gradient(
    x_s: Tensor,
    s: Tensor,
    matching: Draws,
    augmenting: Draws,
    teacher: Field,
    guided: Field,
    fake_score: Field,
    eta: float,
) -> Tensor:
    """The generator gradient with the teacher's guidance apart, shape of `x_s`.

    Decoupled DMD (arXiv 2511.22677, its equation 8): s_guided − s_fake = (s_teacher − s_fake) +
    (s_guided − s_teacher), "distribution matching" and "CFG augmentation", each with draws of its
    own. On the same draws they add up to `matching_gradient` with the guided teacher but for the
    scale, by which each part is divided as METHOD §4 does; the paper's equation has none.
    """
    part = matching_gradient(x_s, s, *matching, teacher, fake_score, eta)
    return part + matching_gradient(x_s, s, *augmenting, guided, teacher, eta)


def matching_loss(x_s: Tensor, gradient: Tensor) -> Tensor:
    """½ mean‖x_s − sg(x_s − g)‖² per sample: (B,), whose gradient is g over the elements."""
    target = (x_s - gradient).detach()
    return 0.5 * ((x_s - target) ** 2).flatten(1).mean(1)
