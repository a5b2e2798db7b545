"""The losses against closed forms (METHOD §4, §5)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tiltflow import flow
from tiltflow.method.consistency import consistency_loss
from tiltflow.method.distribution_matching import matching_gradient, matching_loss
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.policy import (
    choose_steps,
    clipped_surrogate,
    group_advantages,
    policy_kl,
    share_in_groups,
)
from tiltflow.method.reward_backprop import in_equal_parts, reward_gradient
from tiltflow.method.rollout import attach, attach_from, log_prob, rollout
from tiltflow.models.backbone import Conditioning


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_field(mean: float, c: float):
    """The exact velocity of data N(mean, c²)."""

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = flow.broadcast(sigma, x)
        variance = (1 - level) ** 2 * c**2 + level**2
        slope = (level - (1 - level) * c**2) / variance
        return slope * (x - (1 - level) * mean) - mean

    return velocity


def nothing(rows: int) -> Conditioning:
    return Conditioning({"none": torch.zeros(rows, 0)}, {"none": torch.zeros(rows, 0)})


class TestMatching:
    def gradient(self, fake_mean: float, s: float = 0.5, seed: int = 0) -> torch.Tensor:
        x_s = flow.interpolate(fake_mean + draw(64, 2), draw(64, 2, seed=1), torch.tensor(s))
        level, t = torch.full((64,), s).double(), torch.full((64,), 0.8).double()
        return matching_gradient(
            x_s,
            level,
            t,
            draw(64, 2, seed=2),
            draw(64, 2, seed=3),
            gaussian_field(0.0, 1.0),
            gaussian_field(fake_mean, 1.0),
            0.9,
        )

    def test_zero_where_the_fake_score_is_the_teacher(self) -> None:
        assert bool((self.gradient(0.0) == 0).all())

    def test_points_from_the_teacher_to_the_fake(self) -> None:
        """Descending along g must move samples that lie too far right to the left."""
        assert bool((self.gradient(1.0) > 0).all())
        assert bool((self.gradient(-1.0) < 0).all())

    def test_normalised_by_the_distance_to_the_teachers_guess(self) -> None:
        x_s, z, noise = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
        s, t = torch.zeros(3).double(), torch.full((3,), 0.6).double()
        teacher, fake = gaussian_field(0.0, 1.0), gaussian_field(2.0, 0.5)
        x_t = flow.renoise(x_s, s, t, noise)
        a, b = (flow.x0_from_velocity(x_t, f(x_t, t), t) for f in (teacher, fake))
        expected = (b - a) / ((x_s - a).abs().mean(1, keepdim=True) + 1e-6)
        torch.testing.assert_close(
            matching_gradient(x_s, s, t, noise, z, teacher, fake, 0.9), expected
        )

    def test_loss_has_the_gradient(self) -> None:
        x, g = draw(3, 4).requires_grad_(True), draw(3, 4, seed=1)
        (found,) = torch.autograd.grad(matching_loss(x, g).sum(), x)
        torch.testing.assert_close(found, g / 4)


class TestConsistency:
    def loss(self, field, form: str = "two_sample", n: int = 100_000) -> torch.Tensor:
        t = torch.full((n,), 0.7).double()
        x = flow.interpolate(draw(n, 1), draw(n, 1, seed=1), t)
        noise = (draw(n, 1, seed=2), draw(n, 1, seed=3))
        return consistency_loss(field, x, t, field(x, t), t - 0.2, noise, 0.9, form)

    def test_zero_in_the_mean_for_a_martingale(self) -> None:
        """For a point mass h is constant; CPS transitions then keep it exactly."""
        losses = self.loss(gaussian_field(0.4, 0.0))
        assert losses.abs().max().item() < 1e-20

    def test_two_sample_form_is_unbiased(self) -> None:
        """Its mean is the squared conditional gap, the one-sample form's is larger."""
        field, n = gaussian_field(0.5, 1.0), 100_000
        biased = lambda x, sigma: field(x, sigma) + 0.3  # noqa: E731
        two, one = self.loss(biased), self.loss(biased, "one_sample")
        x = flow.interpolate(draw(n, 1), draw(n, 1, seed=1), torch.tensor(0.7).double())
        t, then = torch.tensor(0.7).double(), torch.tensor(0.5).double()
        mean, _std = flow.cps_mean_std(x, biased(x, t), t, then, 0.9)
        h = lambda y, level: flow.x0_from_velocity(y, biased(y, level), level)  # noqa: E731
        # h is linear in x here, so its conditional mean is h at the mean.
        gap = (h(mean, then) - h(x, t)) ** 2
        error = float((two - gap.flatten()).std()) / math.sqrt(n)
        assert float(two.mean() - gap.mean()) == pytest.approx(0, abs=5 * error)
        assert float(one.mean()) > float(gap.mean()) + 10 * error
        assert bool((two < 0).any()) and bool((one >= 0).all())

    def test_unknown_form(self) -> None:
        with pytest.raises(ValueError, match="none of two_sample, one_sample"):
            self.loss(gaussian_field(0.0, 1.0), "three_sample", 2)


def test_fake_score_objective_is_matching_plus_weighted_consistency() -> None:
    n, field = 8, gaussian_field(0.2, 0.7)
    x_s, s, t = draw(n, 2), torch.full((n,), 0.5).double(), torch.full((n,), 0.8).double()
    draws = FakeScoreDraws(
        t, draw(n, 2, seed=1), torch.full((n,), 0.1).double(),
        (draw(n, 2, seed=2), draw(n, 2, seed=3)),
    )  # fmt: skip
    bare, _ = fake_score_objective(field, x_s, s, draws, 0.0, 0.9)
    full, parts = fake_score_objective(field, x_s, s, draws, 0.5, 0.9)
    x_t = flow.renoise(x_s, s, t, draws.noise)
    torch.testing.assert_close(bare, flow.fake_score_loss(field(x_t, t), x_s, s, t, draws.noise))
    torch.testing.assert_close(full, bare + 0.5 * parts["fake_score/consistency"])


class TestPolicy:
    def test_advantages_of_one_reward(self) -> None:
        rewards = torch.tensor([0.0, 1.0, 2.0, 2.0])
        out, metrics = group_advantages({"r": rewards}, {"r": 1.0}, 2)
        centred = torch.tensor([-0.5, 0.5, 0.0, 0.0]) / (rewards.std(unbiased=False) + 1e-4)
        torch.testing.assert_close(out, centred / (centred.std(unbiased=False) + 1e-4))
        assert metrics["policy/flat_groups/r"].item() == 0.5

    def test_a_wide_reward_does_not_drown_a_narrow_one(self) -> None:
        narrow, wide = draw(64).float(), 1000 * draw(64, seed=1).float()
        out, _ = group_advantages({"n": narrow, "w": wide}, {"n": 1.0, "w": 1.0}, 8)
        same, _ = group_advantages({"n": narrow, "w": wide / 1000}, {"n": 1.0, "w": 1.0}, 8)
        torch.testing.assert_close(out, same, rtol=1e-3, atol=1e-3)

    def test_equal_rewards_give_exactly_nothing(self) -> None:
        out, metrics = group_advantages({"r": torch.full((8,), 0.1)}, {"r": 1.0}, 4)
        assert bool((out == 0).all()) and metrics["policy/flat_groups/r"].item() == 1

    def test_clipped_at_five(self) -> None:
        rewards = torch.zeros(400)
        rewards[0] = 1.0
        out, _ = group_advantages({"r": rewards}, {"r": 1.0}, 4)
        assert out.max().item() == 5.0

    def test_groups_must_fill_the_batch(self) -> None:
        with pytest.raises(ValueError, match="do not fill groups of 4"):
            group_advantages({"r": torch.zeros(6)}, {"r": 1.0}, 4)

    def test_surrogate_and_its_clip(self) -> None:
        new = torch.tensor([0.0, 0.1, 0.1, -0.1], requires_grad=True)
        advantages = torch.tensor([1.0, 1.0, -1.0, 1.0])
        losses = clipped_surrogate(new, torch.zeros(4), advantages, 1e-5)
        torch.testing.assert_close(
            losses.detach(), torch.tensor([-1.0, -(1 + 1e-5), math.exp(0.1), -math.exp(-0.1)])
        )
        losses.sum().backward()
        assert new.grad is not None
        assert new.grad[1].item() == 0 and new.grad[0].item() == -1
        assert new.grad[2].item() == pytest.approx(math.exp(0.1))

    def test_kl_of_gaussians(self) -> None:
        a, b, std = draw(5, 3), draw(5, 3, seed=1), torch.full((5, 1), 0.4).double()
        exact = torch.distributions.kl_divergence(
            torch.distributions.Normal(a, std), torch.distributions.Normal(b, std)
        ).mean(1)
        torch.testing.assert_close(policy_kl(a, b, std, "gaussian"), exact)

    def test_log_prob_conventions(self) -> None:
        x, mean, std = draw(5, 3), draw(5, 3, seed=1), torch.full((5, 1), 0.4).double()
        exact = torch.distributions.Normal(mean, std).log_prob(x).mean(1)
        torch.testing.assert_close(log_prob(x, mean, std, "gaussian"), exact)
        torch.testing.assert_close(log_prob(x, mean, std), -((x - mean) ** 2).mean(1))

    def test_steps_and_shared_noise(self) -> None:
        assert choose_steps(torch.tensor([2, 0, 1]), 2) == (0, 2)
        noise = draw(6, 2)
        shared = share_in_groups(noise, 3)
        assert torch.equal(shared[:3], noise[:1].expand(3, 2))
        assert torch.equal(shared[3:], noise[3:4].expand(3, 2))


def test_reward_gradient_in_chunks_equals_one_piece() -> None:
    x0, weights = draw(7, 5), draw(7, 5, seed=1)
    decode = torch.tanh

    def reward(images: torch.Tensor, rows: slice) -> torch.Tensor:
        return (images * weights[rows]).sum(1)

    leaf = x0.clone().requires_grad_(True)
    losses = torch.relu(0.5 - (decode(leaf) * weights).sum(1))
    (expected,) = torch.autograd.grad(losses.sum(), leaf)
    for chunk in (1, 3, 7):
        found, gradient = reward_gradient(x0, decode, reward, 0.5, chunk)
        torch.testing.assert_close(found, losses.detach())
        torch.testing.assert_close(gradient, expected)
    assert bool((gradient[losses.detach() == 0] == 0).all())


def test_gradients_in_equal_parts() -> None:
    """Every sample's norm is that of elements 1/n in size; directions stay, and so does zero."""
    gradient = draw(5, 2, 3) * torch.tensor([1e-6, 1.0, 1e6, 0.0, 3.0]).view(-1, 1, 1)
    equal = in_equal_parts(gradient)
    torch.testing.assert_close(
        equal.flatten(1).norm(dim=1), torch.tensor([1, 1, 1, 0, 1]).double() / math.sqrt(6)
    )
    cosine = torch.nn.functional.cosine_similarity(equal.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.tensor([1, 1, 1, 0, 1]).double())
    assert bool((equal[3] == 0).all())


@pytest.mark.parametrize("convention", ["gaussian", "unit"])
def test_hybrid_policy_gradient_of_a_linear_gaussian_generator(convention: str) -> None:
    """Score function on the stochastic steps + pathwise on the last = the closed form.

    The generator's velocity is v = a x + c; every state is Gaussian with moments that a
    recursion gives, and E[(x₀ − 1)²] is differentiated through them. Under "unit" the density
    has variance ½ instead of std², so each step's gradient is 2 std² times the true one.
    """
    theta = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)
    eta, n = 0.9, 400_000

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: object = None) -> torch.Tensor:
        return theta[0] * x + theta[1]

    x = draw(n, 1)
    trajectory = rollout(
        velocity, x, sigmas, nothing(n), eta, lambda k: draw(n, 1, seed=10 + k),
        record=(0, 1), convention=convention,
    )  # fmt: skip
    reward = -((trajectory.end - 1) ** 2).flatten()
    advantages = reward - reward.mean()
    per_sample = torch.zeros(2, n, dtype=torch.float64)
    for k in (0, 1):
        _, mean, std = attach(velocity, trajectory, k)
        now = log_prob(trajectory.states[k + 1], mean, std, convention)
        assert torch.equal(now.detach(), trajectory.log_probs[k])  # the first ratio is 1
        surrogate = clipped_surrogate(now, trajectory.log_probs[k], advantages, 1e-5)
        scale = 1.0 if convention == "gaussian" else float(1 / (2 * std.flatten()[0] ** 2))
        per_sample += scale * torch.stack(_per_sample(-surrogate, mean, theta, trajectory, k))
    last, _, _ = attach(velocity, trajectory, 2)
    _losses, gradient = reward_gradient(
        last, lambda z: z, lambda z, rows: -((z - 1) ** 2).flatten(), 1e6, n
    )
    # d x̂₀/dθ = (d mean/d v) (x, 1), and the loss is target − R
    slope = -(sigmas[2]) * -gradient.flatten()
    per_sample += torch.stack([slope * trajectory.states[2].flatten(), slope])
    found, error = per_sample.mean(1), per_sample.std(1) / math.sqrt(n)
    expected = torch.autograd.grad(_expected_reward(theta, sigmas, eta), theta)[0]
    assert bool(((found - expected).abs() < 5 * error).all()), (found, expected, error)
    assert bool((error < 0.05 * expected.abs().max()).all())


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_pathwise_gradient_of_several_steps(first: int) -> None:
    """Through all steps from `first` it is autograd's of the sampler itself, noise held fixed."""
    theta = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: object = None) -> torch.Tensor:
        return torch.tanh(theta[0] * x + theta[1])

    trajectory = rollout(
        velocity, draw(32, 3), sigmas, nothing(32), 0.9, lambda k: draw(32, 3, seed=10 + k)
    )
    x0 = attach_from(velocity, trajectory, first)
    assert torch.equal(x0.detach(), trajectory.end)
    x = trajectory.states[first]
    for k in range(first, 3):
        z = draw(32, 3, seed=10 + k) if k < 2 else None
        x = flow.cps_step(x, velocity(x, sigmas[k]), sigmas[k], sigmas[k + 1], 0.9, z)
    weights = draw(32, 3, seed=3)
    found, expected = (torch.autograd.grad((y * weights).sum(), theta)[0] for y in (x0, x))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_bounded_pathwise_gradient() -> None:
    """The bound scales a sample's gradient at the states between the steps, and nothing else."""
    theta = torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)  # one a step
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: object = None) -> torch.Tensor:
        k = int((sigmas == sigma[0]).nonzero())
        return -theta[k] * x

    trajectory = rollout(
        velocity, draw(8, 3), sigmas, nothing(8), 0.9, lambda k: draw(8, 3, seed=10 + k)
    )
    weights = draw(8, 3, seed=3) * torch.linspace(0.1, 10, 8).view(-1, 1)

    def gradient(most: float | None) -> torch.Tensor:
        x0 = attach_from(velocity, trajectory, 0, most)
        assert torch.equal(x0.detach(), trajectory.end)
        per_sample = (x0 * weights).sum(1)
        rows = [torch.autograd.grad(v, theta, retain_graph=True)[0] for v in per_sample]
        return torch.stack(rows)

    plain, norm = gradient(None), weights.norm(dim=1)
    assert torch.equal(gradient(1e9), plain)
    most = float(norm.median())
    bounded = gradient(most)
    assert torch.equal(bounded[:, 2], plain[:, 2])
    # x̂₀ = (1 + θ/2) x from the last state, so the gradient there has 1.25 times the norm
    scale = (most / (1.25 * norm)).clamp(max=1)
    torch.testing.assert_close(bounded[:, 1], plain[:, 1] * scale)
    assert bool((scale < 1).any()) and bool((scale == 1).any())
    assert bool((bounded[:, 0].abs() <= plain[:, 0].abs() * scale + 1e-12).all())


def test_the_pathwise_gradient_of_a_linear_gaussian_generator() -> None:
    """Through every step it is the closed form that the hybrid gradient estimates, too."""
    theta = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)
    n = 200_000

    def velocity(x: torch.Tensor, sigma: torch.Tensor, cond: object = None) -> torch.Tensor:
        return theta[0] * x + theta[1]

    trajectory = rollout(
        velocity, draw(n, 1), sigmas, nothing(n), 0.9, lambda k: draw(n, 1, seed=10 + k)
    )
    reward = -((attach_from(velocity, trajectory, 0) - 1) ** 2).flatten()
    found = torch.stack(
        [torch.autograd.grad(part.mean(), theta, retain_graph=True)[0] for part in reward.chunk(50)]
    )
    expected = torch.autograd.grad(_expected_reward(theta, sigmas, 0.9), theta)[0]
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())
    assert bool((error < 0.05 * expected.abs().max()).all())


def _per_sample(value, mean, theta, trajectory, k):
    """d value/dθ of each sample, through mean = α x + β v with v = θ₀ x + θ₁."""
    (outer,) = torch.autograd.grad(value.sum(), mean)
    now, then = trajectory.sigmas[k], trajectory.sigmas[k + 1]
    by_v = -(1 - then) * now + then * math.cos(0.9 * math.pi / 2) * (1 - now)
    flat = outer.flatten() * by_v
    return [flat * trajectory.states[k].flatten(), flat]


def _expected_reward(theta, sigmas, eta):
    mean, variance = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for now, then in itertools.pairwise(sigmas):
        cos, sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
        alpha = (1 - then) * (1 - now * theta[0]) + then * cos * (1 + (1 - now) * theta[0])
        beta = (-(1 - then) * now + then * cos * (1 - now)) * theta[1]
        mean, variance = alpha * mean + beta, alpha**2 * variance + (then * sin) ** 2
    return -((mean - 1) ** 2 + variance)
