"""Flow maths (METHOD §1, §2, §4): conversions, shift, the CPS step, re-noising, targets.

Latents are (B, ...), every `sigma`-like argument is (B,) or a scalar tensor in [0, 1] and
broadcasts over the latent. Everything is computed in fp32, or in fp64 when the latent is fp64:
σ and b in bf16 are off by several percent near s = .9. Functions are pure and differentiable.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# METHOD §4: where the re-noised level t of a sub-interval [s, 1] is drawn and clamped.
T_MARGIN, T_MIN, T_MAX = 0.01, 0.02, 0.98

MOST_STEPS = 1000
"""Of a sampler: networks know a thousand levels."""


def _full(x: Tensor) -> Tensor:
    """`x` in fp32, or untouched when it already is fp32 or fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def broadcast(sigma: Tensor, x: Tensor) -> Tensor:
    """A (B,) or scalar level as (B, 1, ..., 1), on `x`'s device and in its (full) precision.

    Raises:
        ValueError: if `sigma` is neither a scalar nor one level a sample.
    """
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"levels of shape {tuple(sigma.shape)} for {x.shape[0]} samples")
    sigma = sigma.to(device=x.device, dtype=_full(x).dtype)
    return sigma.reshape(-1, *([1] * (x.ndim - 1)))


def x0_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x̂₀ = x − σ v, the data read off a velocity (METHOD §1). Shape of `x`."""
    return _full(x) - broadcast(sigma, x) * _full(v)


def noise_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """ε̂ = x + (1 − σ) v, the noise read off a velocity (METHOD §1). Shape of `x`."""
    return _full(x) + (1 - broadcast(sigma, x)) * _full(v)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_σ = (1 − σ) x₀ + σ ε (METHOD §1). Shape of `x0`."""
    level = broadcast(sigma, x0)
    return (1 - level) * _full(x0) + level * _full(noise)


def raw_levels(steps: int) -> list[float]:
    """The K equal raw levels 1, …, 1/K before any shift (METHOD §1).

    Raises:
        ValueError: if `steps` is below 1 or above `MOST_STEPS`.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"a sampler takes at least 1 step and at most {MOST_STEPS}, not {steps}")
    return np.linspace(1.0, 1 / steps, steps).tolist()


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Static shift f(u) = αu / (1 + (α − 1)u) of raw levels in [0, 1] (METHOD §1)."""
    u = _full(u)
    return shift * u / (1 + (shift - 1) * u)


def cps_mean_std(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean (shape of `x`) and std (B, 1, ..., 1) of one CPS step σ → σ' (METHOD §2).

    mean = (1 − σ') x̂₀ + σ' cos θ ε̂ and std = σ' sin θ with θ = ηπ/2, `eta` in [0, 1].
    """
    theta = eta * math.pi / 2
    # sin(pi) and cos(pi/2) are not exactly 0 in floating point; the end points should be.
    cos, sin = (0.0, 1.0) if eta == 1 else (math.cos(theta), math.sin(theta))
    level = broadcast(sigma_next, x)
    x0, noise = x0_from_velocity(x, v, sigma), noise_from_velocity(x, v, sigma)
    return (1 - level) * x0 + level * cos * noise, level * sin


def cps_step(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, noise: Tensor | None
) -> Tensor:
    """One CPS step with fresh N(0, I) `noise` of `x`'s shape (METHOD §2).

    `noise` may be None where the step is deterministic (η = 0, or σ' = 0).
    """
    mean, std = cps_mean_std(x, v, sigma, sigma_next, eta)
    return mean if noise is None else mean + std * _full(noise)


def euler_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (σ' − σ) v, the ODE's Euler step as diffusers' scheduler takes it. Shape of `x`.

    Equal to the CPS step with η = 0 up to rounding; this is the form whose rounding is the
    pipelines' own.
    """
    return _full(x) + (broadcast(sigma_next, x) - broadcast(sigma, x)) * _full(v)


def renoise_scale(s: Tensor, t: Tensor) -> Tensor:
    """b = sqrt(t² − ((1−t)/(1−s))² s²), the fresh noise's scale from s up to t (METHOD §4).

    Shape of the levels. With a = (1−t)/(1−s), t² − a²s² = (t − as)(t + as) and
    t − as = (t − s)/(1 − s), which does not cancel when t is close to s.
    """
    s, t = _full(s), _full(t)
    a_s = (1 - t) / (1 - s) * s
    return torch.sqrt((t - s) / (1 - s) * (t + a_s))


def renoise(x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = a x_s + b n, a sample at level s carried to level t > s (METHOD §4)."""
    level_s, level_t = broadcast(s, x_s), broadcast(t, x_s)
    a = (1 - level_t) / (1 - level_s)
    return a * _full(x_s) + renoise_scale(level_s, level_t) * _full(noise)


def velocity_target(x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The ambient target v* whose mean given x_t is the true velocity (METHOD §4).

    v* = −x_s/(1−s) + [t + (1−t) s²/(1−s)²] / b · n. Shape of `x_s`; n is `renoise`'s noise.
    """
    level_s, level_t = broadcast(s, x_s), broadcast(t, x_s)
    ratio = level_s / (1 - level_s)
    scale = (level_t + (1 - level_t) * ratio**2) / renoise_scale(level_s, level_t)
    return scale * _full(noise) - _full(x_s) / (1 - level_s)


def fake_score_loss(v_pred: Tensor, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """min(1, 10 b²) · ‖v_φ − v*‖², averaged over the elements of a sample: (B,) (METHOD §4)."""
    error = _full(v_pred) - velocity_target(x_s, s, t, noise)
    b = renoise_scale(broadcast(s, x_s), broadcast(t, x_s))
    weight = torch.clamp(10 * b**2, max=1.0)
    return (weight * error**2).flatten(1).mean(1)


def renoise_level(s: Tensor, uniform: Tensor) -> Tensor:
    """t ~ U(s + .01, 1) clamped to [.02, .98], from `uniform` draws in [0, 1): (B,) (METHOD §4).

    The lower clamp never undercuts s + .01, so that b stays positive for any grid.
    """
    low = _full(s) + T_MARGIN
    t = low + (1 - low) * uniform.to(low)
    return torch.maximum(t.clamp(T_MIN, T_MAX), torch.minimum(low, (1 + _full(s)) / 2))
