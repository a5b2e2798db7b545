"""The mixture backbone against Monte Carlo, autograd, importance weights and its own samples."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiltflow.flow import interpolate
from tiltflow.models.backbone import Backbone
from tiltflow.models.families.mixture import (
    GaussianMixture,
    MixtureBackbone,
    fit_tilt,
    ring,
    sliced_wasserstein,
)
from tiltflow.models.families.mixture_student import StudentNetwork, fitted_student

RIGHT = torch.tensor([1.0, 0.0])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture()
def lopsided() -> GaussianMixture:
    """Three modes of unequal std and weight: no symmetry to hide behind. fp64."""
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.2], [0.1, -1.2]], dtype=torch.float64)
    std, weights = torch.tensor([0.2, 0.4, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    return GaussianMixture(means, std, weights)


@pytest.fixture(scope="module")
def backbone() -> MixtureBackbone:
    return MixtureBackbone()


def euler(backbone: MixtureBackbone, network: nn.Module, x: Tensor, grid: Tensor) -> Tensor:
    cond = backbone.encode([""] * len(x))
    with torch.no_grad():
        for sigma, after in itertools.pairwise(grid):
            x = x + (after - sigma) * backbone.velocity(network, x, sigma.expand(len(x)), cond)
    return x


@pytest.mark.parametrize("level", [0.05, 0.3, 0.6, 0.95])
def test_velocity_follows_the_score(lopsided: GaussianMixture, level: float) -> None:
    x = torch.randn(32, 2, dtype=torch.float64, generator=seeded()).requires_grad_()
    sigma = torch.full((32,), level, dtype=torch.float64)
    (score,) = torch.autograd.grad(lopsided.noised_log_density(x, sigma).sum(), x)
    # METHOD §4: v = −(x + σ · score) / (1 − σ)
    expected = -(x.detach() + level * score) / (1 - level)
    torch.testing.assert_close(lopsided.velocity(x.detach(), sigma), expected)


def test_velocity_is_the_conditional_mean(lopsided: GaussianMixture) -> None:
    """E[(ε − x₀) f(x_σ)] = E[v(x_σ) f(x_σ)] for every f, which defines the conditional mean."""
    n, level = 400_000, 0.45
    x0 = lopsided.sample(n, seeded(1))
    noise = torch.randn(n, 2, dtype=torch.float64, generator=seeded(2))
    sigma = torch.full((n,), level, dtype=torch.float64)
    x = interpolate(x0, noise, sigma)
    gap = noise - x0 - lopsided.velocity(x, sigma)
    for test in (torch.ones_like(x), x, x.flip(1), (3 * x).sin(), (x > 0.3).double()):
        product = gap * test
        error = product.mean(0) / (product.std(0) / math.sqrt(n))
        assert error.abs().max() < 4


def test_velocity_at_the_ends(lopsided: GaussianMixture) -> None:
    x = 3 * torch.randn(16, 2, dtype=torch.float64, generator=seeded())
    mean = lopsided.weights @ lopsided.means
    torch.testing.assert_close(lopsided.velocity(x, torch.zeros(16)), -x)
    torch.testing.assert_close(lopsided.velocity(x, torch.ones(16)), x - mean)
    far = torch.tensor([[50.0, -50.0]])
    for level in (0.0, 1e-6, 0.5, 1.0):
        assert torch.isfinite(lopsided.velocity(far, torch.tensor([level]))).all()


def test_density_integrates_to_one(lopsided: GaussianMixture) -> None:
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    assert float(lopsided.log_density(grid).exp().sum()) * cell == pytest.approx(1, abs=1e-6)
    by_hand = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(lopsided.weights),
        torch.distributions.Independent(
            torch.distributions.Normal(lopsided.means, lopsided.std[:, None].expand(3, 2)), 1
        ),
    )
    torch.testing.assert_close(lopsided.log_density(grid[::997]), by_hand.log_prob(grid[::997]))


def test_the_ode_carries_noise_to_the_mixture(backbone: MixtureBackbone) -> None:
    mixture, n = backbone.mixture, 4096
    noise = torch.randn(n, 2, generator=seeded(3))
    x = euler(backbone, backbone.teacher_base, noise, backbone.teacher_sigmas(200))
    one, other = mixture.sample(n, seeded(4)), mixture.sample(n, seeded(5))
    floor = sliced_wasserstein(one, other, generator=seeded())
    assert sliced_wasserstein(x, one, generator=seeded()) < 2 * floor
    assert mixture.share_within(x) == pytest.approx(0.989, abs=0.006)
    assert (mixture.mode_masses(x) - 1 / 8).abs().max() < 0.025


def test_tilting_is_reweighting_by_the_reward(lopsided: GaussianMixture) -> None:
    direction, beta = torch.tensor([0.6, -0.8], dtype=torch.float64), 1.3
    tilted = lopsided.tilted(direction, beta)
    x = lopsided.sample(64, seeded())
    # exact: log p̃ − log p − β r is a constant, −log Z
    log_z = beta * (x @ direction) + lopsided.log_density(x) - tilted.log_density(x)
    torch.testing.assert_close(log_z, log_z.mean().expand(64))
    many = lopsided.sample(400_000, seeded(1))
    weights = torch.softmax(beta * (many @ direction), dim=0)
    torch.testing.assert_close(weights @ many, tilted.weights @ tilted.means, atol=0.01, rtol=0)


@pytest.mark.parametrize("beta", [-1.5, 0.0, 0.4, 2.0])
def test_fit_tilt_recovers_beta(lopsided: GaussianMixture, beta: float) -> None:
    for mixture in (ring(), lopsided):
        fitted, kl = fit_tilt(mixture.tilted(RIGHT, beta).weights, mixture, RIGHT)
        assert fitted == pytest.approx(beta, abs=1e-3)
        assert 0 <= kl < 1e-6


def test_fit_tilt_of_samples_and_of_strangers() -> None:
    mixture = ring()
    fitted, kl = fit_tilt(mixture.tilted(RIGHT, 0.8).sample(20_000, seeded()), mixture, RIGHT)
    assert fitted == pytest.approx(0.8, abs=0.05)
    assert kl < 2e-3
    # One mode on each side along the reward: the best β is 0, and the KL to it log 8 − log 2.
    masses = torch.tensor([0.5, 0, 0, 0, 0.5, 0, 0, 0])
    fitted, kl = fit_tilt(masses, mixture, RIGHT)
    assert fitted == pytest.approx(0, abs=1e-4)
    assert kl == pytest.approx(math.log(4), abs=1e-6)


def test_shares_and_masses() -> None:
    mixture = ring()
    x = mixture.sample(50_000, seeded())
    assert mixture.share_within(x) == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert mixture.share_within(x, k=1) == pytest.approx(1 - math.exp(-0.5), abs=0.01)
    assert mixture.share_within(torch.zeros(5, 2)) == 0
    points = mixture.means[[0, 0, 3, 7]] + 0.1
    assert mixture.mode_masses(points).tolist() == [0.5, 0, 0, 0.25, 0, 0, 0, 0.25]


def test_sliced_wasserstein_of_a_shift() -> None:
    a = torch.randn(500, 2, generator=seeded())
    assert sliced_wasserstein(a, a.flip(0), generator=seeded()) == 0
    # Projections of a shift by c are shifts by c cos θ, and the mean of |cos θ| is 2/π.
    shifted = sliced_wasserstein(a, a + 3 * RIGHT, 20_000, generator=seeded())
    assert shifted == pytest.approx(6 / math.pi, rel=0.02)
    with pytest.raises(ValueError, match="equal"):
        sliced_wasserstein(a, a[:100], generator=seeded())


def test_the_student_is_fitted_to_the_teacher(backbone: MixtureBackbone) -> None:
    student, mixture, n = backbone.new_student(0), backbone.mixture, 4096
    for level in (0.02, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0):
        sigma = torch.full((n,), level)
        noise = torch.randn(n, 2, generator=seeded(6))
        x = interpolate(mixture.sample(n, seeded(7)), noise, sigma)
        exact = mixture.velocity(x, sigma)
        with torch.no_grad():
            error = (student(x, sigma) - exact).square().mean() / exact.square().mean()
        assert error < 0.004, level
    x = euler(backbone, student, noise, backbone.teacher_sigmas(50))
    assert mixture.share_within(x) > 0.96


def test_students_are_copies_and_depend_on_the_seed(backbone: MixtureBackbone) -> None:
    quick = MixtureBackbone(fit_steps=3)
    torch.manual_seed(11)
    one = quick.new_student(1)
    torch.manual_seed(12)
    again = MixtureBackbone(fit_steps=3).new_copy("teacher", 1)
    other = quick.new_copy("student", 2)
    assert isinstance(one, StudentNetwork)
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and a.requires_grad
    assert not torch.equal(one.out.weight, other.get_parameter("out.weight"))
    with torch.no_grad():
        one.out.weight.zero_()
    assert bool(quick.new_student(1).get_parameter("out.weight").any())
    assert not any(p.requires_grad for p in quick.student_base.parameters())
    assert not list(backbone.teacher_base.parameters())


def test_the_cache_tells_mixtures_apart() -> None:
    narrow = MixtureBackbone(ring(std=0.1), fit_steps=3).new_student(0)
    wide = MixtureBackbone(ring(std=0.3), fit_steps=3).new_student(0)
    assert not torch.equal(narrow.get_parameter("out.weight"), wide.get_parameter("out.weight"))


def test_the_backbone_protocol(backbone: MixtureBackbone) -> None:
    typed: Backbone = backbone
    assert typed.family == "mixture" and typed.latent_shape == (2,)
    cond = typed.encode(["a", "b", "c"])
    assert len(cond) == 3 and len(cond[1:]) == 2 and len(cond.repeat(4)) == 12
    x, sigma = torch.randn(6, 2, generator=seeded()), torch.full((6,), 0.5)
    v = typed.velocity(typed.teacher_base, x, sigma, cond, 1.0)
    assert v.dtype == torch.float32
    assert torch.equal(v, backbone.mixture.velocity(x, sigma))
    assert typed.decode(x) is x
    expected = torch.tensor([1, 0.9, 0.75, 0.5, 0])
    torch.testing.assert_close(typed.few_step_sigmas(4), expected)
    assert typed.teacher_sigmas(50).shape == (51,)
    with pytest.raises(ValueError, match="guidance must be 1, not 4.5"):
        typed.velocity(typed.teacher_base, x, sigma, cond, 4.5)
    with pytest.raises(ValueError, match="3 prompts for 4 latents"):
        typed.velocity(typed.teacher_base, x[:4], sigma[:4], cond, 1.0)


def test_bad_input_is_refused() -> None:
    means = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="std must all be positive"):
        GaussianMixture(means, 0.0, torch.ones(2))
    with pytest.raises(ValueError, match="weights must all be positive"):
        GaussianMixture(means, 0.1, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="for 2 modes"):
        GaussianMixture(means, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="same reward"):
        fit_tilt(torch.full((2,), 0.5), GaussianMixture(means, 0.1, torch.ones(2)), RIGHT)
    with pytest.raises(ValueError, match="sum to 1"):
        fit_tilt(torch.ones(8), ring(), RIGHT)
    with pytest.raises(ValueError, match="at least 1 step"):
        MixtureBackbone().few_step_sigmas(0)
    with pytest.raises(ValueError, match="'student' or 'teacher'"):
        MixtureBackbone().new_copy("ema", 0)
    with pytest.raises(ValueError, match="no adapters"):
        MixtureBackbone().lora_targets()


def test_a_fit_is_kept_for_the_processes_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILTFLOW_CACHE", str(tmp_path))
    fit = partial(fitted_student, ring(), seed=0, steps=3, shift=3.0)
    first = fit()
    (kept,) = (tmp_path / "mixture").iterdir()
    times = kept.stat().st_mtime_ns
    assert same(fit(), first) and kept.stat().st_mtime_ns == times
    # another mixture, seed, length or shift is another fit
    for other in (
        partial(fit, seed=1), partial(fit, steps=4), partial(fit, shift=2.0),
        partial(fitted_student, ring(std=0.3), seed=0, steps=3, shift=3.0),
    ):  # fmt: skip
        assert not same(other(), first)
    assert len(list((tmp_path / "mixture").iterdir())) == 5
    kept.write_bytes(kept.read_bytes()[:-1])
    assert same(fit(), first) and kept.stat().st_mtime_ns > times
    # sums of another number of threads are another fit's
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    fit()
    assert len(list((tmp_path / "mixture").iterdir())) == 6
    # and where nothing can be kept it is fitted all the same
    monkeypatch.setenv("TILTFLOW_CACHE", str(kept))
    assert same(fit(), first)


def same(one: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in one.state_dict().items())
