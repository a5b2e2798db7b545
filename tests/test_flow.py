"""Flow maths against closed forms (METHOD §1, §2, §4)."""

from __future__ import annotations

import math

import pytest
import torch

from tiltflow import flow


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_conversions_invert_the_interpolant() -> None:
    x0, noise = draw(5, 3, 4), draw(5, 3, 4, seed=1)
    sigma = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x = flow.interpolate(x0, noise, sigma)
    v = noise - x0
    torch.testing.assert_close(flow.x0_from_velocity(x, v, sigma), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.noise_from_velocity(x, v, sigma), noise, rtol=0, atol=1e-12)


def test_shift_gives_the_published_grid() -> None:
    grid = flow.shift_sigma(torch.linspace(1, 0, 5), 3.0)
    torch.testing.assert_close(grid, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_bf16_inputs_are_computed_in_fp32() -> None:
    x, v = draw(2, 3, dtype=torch.bfloat16), draw(2, 3, seed=1, dtype=torch.bfloat16)
    sigma = torch.tensor([0.9, 0.3])
    out = flow.x0_from_velocity(x, v, sigma)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x.float() - sigma[:, None] * v.float(), rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9, 1.0])
def test_cps_keeps_the_marginal(eta: float) -> None:
    """With the exact velocity of a point mass at x₀, a step from level σ lands at level σ'."""
    n, x0 = 200_000, 0.7
    sigma = torch.tensor(0.8, dtype=torch.float64)
    noise = draw(n, 1)
    x = flow.interpolate(torch.full_like(noise, x0), noise, sigma)
    v = noise - x0
    sigma_next = torch.tensor(0.4, dtype=torch.float64)
    moved = flow.cps_step(x, v, sigma, sigma_next, eta, draw(n, 1, seed=2))
    assert abs(moved.mean().item() - 0.6 * x0) < 4 * 0.4 / math.sqrt(n)
    assert abs(moved.std().item() - 0.4) < 4 * 0.4 / math.sqrt(2 * n)


def test_cps_end_points() -> None:
    x, v, z = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    now, then = torch.full((3,), 0.75).double(), torch.full((3,), 0.5).double()
    euler = flow.euler_step(x, v, now, then)
    torch.testing.assert_close(flow.cps_step(x, v, now, then, 0.0, z), euler, rtol=0, atol=1e-12)
    renoised = 0.5 * flow.x0_from_velocity(x, v, now) + 0.5 * z
    torch.testing.assert_close(flow.cps_step(x, v, now, then, 1.0, z), renoised, rtol=0, atol=1e-12)
    zero = torch.zeros(3).double()
    mean, std = flow.cps_mean_std(x, v, now, zero, 0.9)
    assert bool((std == 0).all())
    torch.testing.assert_close(mean, flow.x0_from_velocity(x, v, now), rtol=0, atol=1e-12)


def test_renoise_scale_closed_form_and_no_cancellation() -> None:
    s, t = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 0.8))
    a = (1 - 0.8) / (1 - 0.5)
    assert flow.renoise_scale(s, t).item() == pytest.approx(
        math.sqrt(0.64 - a**2 * 0.25), abs=1e-14
    )
    close32 = flow.renoise_scale(torch.tensor(0.9), torch.tensor(0.9001))
    exact = flow.renoise_scale(torch.tensor(0.9).double(), torch.tensor(0.9001).double())
    assert close32.item() == pytest.approx(exact.item(), rel=1e-6)
    assert flow.renoise_scale(torch.tensor(0.0), torch.tensor(0.3)).item() == pytest.approx(0.3)


@pytest.mark.parametrize("s", [0.0, 0.5, 0.75, 0.9])
def test_renoise_keeps_the_interpolant(s: float) -> None:
    n, x0 = 200_000, 0.7
    level, t = torch.tensor(s).double(), torch.tensor(0.95).double()
    x_s = flow.interpolate(torch.full((n, 1), x0).double(), draw(n, 1), level)
    x_t = flow.renoise(x_s, level, t, draw(n, 1, seed=1))
    assert x_t.mean().item() == pytest.approx(0.05 * x0, abs=4 * 0.95 / math.sqrt(n))
    assert x_t.std().item() == pytest.approx(0.95, abs=4 * 0.95 / math.sqrt(2 * n))


@pytest.mark.parametrize("s", [0.0, 0.5, 0.9])
def test_velocity_target_has_the_true_conditional_mean(s: float) -> None:
    """For Gaussian data N(m, c²) the velocity is linear in x; a regression of v* finds it."""
    n, m, c, t = 400_000, 0.3, 0.5, 0.95
    level, level_t = torch.tensor(s).double(), torch.tensor(t).double()
    x0 = m + c * draw(n, 1)
    x_s = flow.interpolate(x0, draw(n, 1, seed=1), level)
    noise = draw(n, 1, seed=2)
    x_t = flow.renoise(x_s, level, level_t, noise)
    target = flow.velocity_target(x_s, level, level_t, noise)
    variance = (1 - t) ** 2 * c**2 + t**2
    slope = (t - (1 - t) * c**2) / variance  # Cov(ε − x₀, x_t) / Var(x_t)
    design = torch.cat([x_t - (1 - t) * m, torch.ones_like(x_t)], 1)
    solution = torch.linalg.lstsq(design, target).solution.flatten()
    residual = float((target - design @ solution[:, None]).std()) / math.sqrt(n)
    assert solution[0].item() == pytest.approx(slope, abs=5 * residual / math.sqrt(variance))
    assert solution[1].item() == pytest.approx(-m, abs=5 * residual)


def test_plain_flow_matching_at_s_zero() -> None:
    x0, noise = draw(4, 6), draw(4, 6, seed=1)
    zero, t = torch.zeros(4).double(), torch.rand(4, generator=torch.Generator().manual_seed(3))
    t = t.double().clamp(0.02, 0.98)
    torch.testing.assert_close(
        flow.velocity_target(x0, zero, t, noise), noise - x0, rtol=0, atol=1e-12
    )
    v = draw(4, 6, seed=5)
    expected = torch.clamp(10 * t**2, max=1) * ((v - noise + x0) ** 2).mean(1)
    torch.testing.assert_close(flow.fake_score_loss(v, x0, zero, t, noise), expected)


def test_renoise_level_stays_above_s() -> None:
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    for s in (0.0, 0.5, 0.9, 0.985):
        t = flow.renoise_level(torch.full((10_000,), s), uniform)
        assert bool((t > s).all()) and bool((t < 1).all())
        assert t.min().item() >= min(max(s + 0.01, 0.02), (1 + s) / 2) - 1e-6
        assert bool(torch.isfinite(flow.renoise_scale(torch.tensor(s), t)).all())


def test_wrong_level_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="levels of shape"):
        flow.x0_from_velocity(draw(3, 2), draw(3, 2), torch.ones(2))
