"""Images from a role: few-step CPS sampling, and the teacher's many-step ODE.

Noise belongs to an image's number, not to its place in a batch, so that every system starts from
the same noise and any batch size gives the same image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tiltflow.core.randomness import SAMPLE_INIT, Randomness, sample_step
from tiltflow.flow import euler_step
from tiltflow.method.rollout import rollout
from tiltflow.models.backbone import Conditioning
from tiltflow.models.roles import Role

DRAW_OFFSET = 1_000_003
"""Between the noise numbers of a sample's successive draws."""


def numbered_noise(
    randomness: Randomness, stream: str, numbers: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    """N(0, I) of shape (B, *shape), one draw an image number, on the CPU."""
    return torch.stack([randomness.normal(stream, n, shape) for n in numbers])


@torch.no_grad()
def sample_few_step(
    role: Role,
    cond: Conditioning,
    numbers: Sequence[int],
    randomness: Randomness,
    sigmas: Tensor,
    eta: float,
) -> Tensor:
    """K-step CPS samples without guidance (METHOD §2): latents (B, ...) on the role's device."""
    shape, device = role.backbone.latent_shape, role.backbone.device

    def noise(k: int) -> Tensor:
        return numbered_noise(randomness, sample_step(k), numbers, shape).to(device)

    x = numbered_noise(randomness, SAMPLE_INIT, numbers, shape).to(device)
    return rollout(role, x, sigmas, cond, eta, noise, keep=()).end


@torch.no_grad()
def sample_ode(
    role: Role,
    cond: Conditioning,
    numbers: Sequence[int],
    randomness: Randomness,
    sigmas: Tensor,
    guidance: float,
) -> Tensor:
    """Euler samples of the probability-flow ODE with guidance: latents (B, ...)."""
    shape, device = role.backbone.latent_shape, role.backbone.device
    x = numbered_noise(randomness, SAMPLE_INIT, numbers, shape).to(device)
    levels = sigmas.to(device)
    for now, then in itertools.pairwise(levels):
        sigma = now.expand(len(x))
        x = euler_step(x, role(x, sigma, cond, guidance), sigma, then.expand(len(x)))
    return x
