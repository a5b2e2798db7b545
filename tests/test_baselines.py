"""The objectives of published methods, by numbers worked out by hand, and the terms that have them.

Matching alone, GRPO and the reward's gradient alone are settings of the terms of METHOD §5; the
formulas of these papers are checked here against the functions that the terms call.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from short_runs import cold_start, tilt
from torch import Tensor

from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.method.distribution_matching import matching_gradient
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.forward_process import awm_loss, nft_loss, optimality
from tiltflow.method.policy import clipped_surrogate, group_advantages, window_steps
from tiltflow.method.reward_backprop import reward_gradient

ALONE = ["tilt.policy_weight=0", "tilt.matching_weight=0", "tilt.reward_weight=0"]


def near(value: Tensor, expected: object) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_nft_is_its_papers_formula() -> None:
    """DiffusionNFT (2509.16117): v⁺ = (1 − β) v_old + β v_θ, v⁻ = (1 + β) v_old − β v_θ."""
    near(optimality(torch.tensor([-4.0, -1.0, 0.0, 1.0, 9.0]), 2.0), [0.0, 0.25, 0.5, 0.75, 1.0])
    velocity = torch.tensor([[3.0, 1.0]], requires_grad=True)
    old, target = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    # β = ½: v⁺ = (2, 1), v⁻ = (0, 1); ‖v⁺ − v‖² = (0 + 1)/2, ‖v⁻ − v‖² = (4 + 1)/2
    loss = nft_loss(velocity, old, target, torch.tensor([0.75]), 0.5)
    near(loss, [0.75 * 0.5 + 0.25 * 2.5])
    loss.sum().backward()
    # β [r (v⁺ − v) − (1 − r)(v⁻ − v)], 2/2 of it an element
    near(velocity.grad, [[0.5 * (0.75 * 0 - 0.25 * -2), 0.5 * (0.75 * 1 - 0.25 * 1)]])


def test_nft_on_its_own_policy_follows_the_sign_of_the_advantage() -> None:
    """v_θ = v_old: the gradient is β (2r − 1) times that of plain matching."""
    velocity = torch.tensor([[1.0, 4.0]] * 3, requires_grad=True)
    loss = nft_loss(velocity, velocity.detach(), torch.zeros(3, 2), torch.tensor([0, 0.5, 1]), 0.1)
    loss.sum().backward()
    near(velocity.grad, [[-0.1, -0.4], [0.0, 0.0], [0.1, 0.4]])


def test_awm_is_its_papers_formula() -> None:
    """AWM (2509.25050): ratio exp(−‖v_θ − v‖² + ‖v_old − v‖²), clipped as PPO's."""
    velocity = torch.tensor([[2.0, 0.0], [2.0, 0.0]], requires_grad=True)
    old, target = torch.tensor([[2.0, 2.0]] * 2), torch.tensor([[0.0, 0.0]] * 2)
    # ‖v_θ − v‖² = 2, ‖v_old − v‖² = 4: ratio e², beyond 1.2
    loss = awm_loss(velocity, old, target, torch.tensor([1.5, -1.5]), 0.2)
    near(loss, [-1.5 * 1.2, 1.5 * math.exp(2)])
    loss.sum().backward()
    # clipped: no gradient; else −A · ratio · (−(v_θ − v))
    near(velocity.grad, [[0.0, 0.0], [-1.5 * math.exp(2) * 2.0, 0.0]])


def test_awm_on_its_own_policy_is_matching_weighted_by_the_advantage() -> None:
    velocity = torch.tensor([[1.0, 4.0], [1.0, 4.0]], requires_grad=True)
    loss = awm_loss(velocity, velocity.detach(), torch.zeros(2, 2), torch.tensor([1.0, -2.0]), 1e-4)
    near(loss, [-1.0, 2.0])
    loss.sum().backward()
    near(velocity.grad, [[1.0, 4.0], [-2.0, -8.0]])


def test_matching_at_the_last_step_is_that_of_dmd() -> None:
    """DMD2 (2405.14867): (μ_fake − μ_real) / mean|x − μ_real|, μ the data read off x_t."""
    x, noise = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.5]])
    t, s, any_z = torch.tensor([0.5]), torch.zeros(1), torch.tensor([[9.0, 9.0]])
    real, fake = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])
    g = matching_gradient(x, s, t, noise, any_z, lambda *_: real, lambda *_: fake, 0.9)
    # x_t = (.75, −.25); μ_real = x_t − .5 v = (.25, −1.25), μ_fake = (−.75, .75)
    scale = (abs(1 - 0.25) + abs(-1 + 1.25)) / 2
    near(g, [[(-0.75 - 0.25) / scale, (0.75 + 1.25) / scale]])


def test_without_the_regulariser_the_fake_score_is_fitted_by_matching_alone() -> None:
    """A-DMD, γ = 0: min(1, 10 b²) ‖v_φ − v*‖²; at s = 0 v* is n − x₀ and b is t."""
    x, noise = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.5]])
    draws = FakeScoreDraws(torch.tensor([0.5]), noise, torch.tensor([0.1]), (noise, noise))
    v = torch.tensor([[0.0, 1.0]])
    losses, _ = fake_score_objective(lambda *_: v, x, torch.zeros(1), draws, 0.0, 0.9, "two_sample")
    near(losses, [((0 - (0.5 - 1)) ** 2 + (1 - (0.5 + 1)) ** 2) / 2])


def test_the_rewards_gradient_alone_is_draft_1() -> None:
    """DRaFT-1 (2309.17400) ascends R at the last step; ReFL (2304.05977) relu(target − R)."""
    x = torch.tensor([[1.0, 2.0], [5.0, 0.0]])

    def total(images: Tensor, rows: slice) -> Tensor:
        return images[:, 0] * images[:, 1] + images[:, 0]

    losses, gradient = reward_gradient(x, lambda latents: latents, total, 4.0, 2)
    near(losses, [4.0 - 3.0, 0.0])  # the second is beyond the target: ReFL leaves it
    near(gradient, [[-3.0, -1.0], [0.0, 0.0]])
    _, gradient = reward_gradient(x, lambda latents: latents, total, 1000.0, 2)
    near(gradient, [[-3.0, -1.0], [-1.0, -5.0]])  # −∇R: DRaFT-1


def test_grpo_is_its_papers_formula() -> None:
    """Flow-GRPO (2505.05470): A = (r − mean)/std in a group, min(ρA, clip(ρ, 1 ± ε)A)."""
    rewards = {"r": torch.tensor([1.0, 3.0, 3.0, 1.0])}
    advantages, _ = group_advantages(rewards, {"r": 1.0}, 2)
    near(advantages.round(decimals=3), [-1.0, 1.0, 1.0, -1.0])
    now, old = torch.log(torch.tensor([2.0, 2.0, 0.5, 0.5])), torch.zeros(4)
    near(
        clipped_surrogate(now, old, torch.tensor([-1.0, 1.0, 1.0, -1.0]), 0.2), [2, -1.2, -0.5, 0.8]
    )


def test_a_window_of_steps_moves_with_the_epochs() -> None:
    """MixGRPO (2507.21802): w successive steps, one further every τ epochs."""
    found = [window_steps(epoch, 3, 2, 2) for epoch in range(6)]
    assert found == [(0, 1), (0, 1), (1, 2), (1, 2), (0, 1), (0, 1)]
    assert [window_steps(e, 4, 1, 1) for e in range(5)] == [(0,), (1,), (2,), (3,), (0,)]
    assert window_steps(7, 3, 3, 1) == (0, 1, 2)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_start(tmp_path_factory.mktemp("cold"))


def trained(out: Path, cold: Path, *more: str) -> dict[str, Tensor]:
    return tilt(out, cold, "train.steps=2", "checkpoint.every=1", *more)


@pytest.mark.parametrize("term", ["nft", "awm"])
def test_a_forward_term_is_of_its_draws_alone(term: str, cold: Path, tmp_path: Path) -> None:
    def terms(weight: float) -> str:
        return f"tilt.terms={{{term}: {{weight: {weight}, draws: 2}}}}"

    whole = trained(tmp_path / "whole", cold, *ALONE, terms(1.0))
    start = dict(load_checkpoint(cold).tensors["ema"])
    assert not all(torch.equal(whole[name], start[name]) for name in whole)
    trained(tmp_path / "parts", cold, *ALONE, terms(1.0), "train.steps=1")
    resumed = trained(tmp_path / "parts", cold, *ALONE, terms(1.0), "run.resume=true")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    small = trained(tmp_path / "small", cold, *ALONE, terms(1.0), "train.micro_batch_size=4")
    for name, value in whole.items():
        torch.testing.assert_close(value, small[name], rtol=1e-3, atol=1e-5)
    off = trained(tmp_path / "off", cold, *ALONE, terms(0.0))
    assert all(torch.equal(off[name], start[name]) for name in off)


def test_a_window_trains_other_steps_than_a_draw(cold: Path, tmp_path: Path) -> None:
    drawn = trained(tmp_path / "a", cold)
    window = trained(tmp_path / "b", cold, "tilt.subset_order=window", "tilt.window_every=1")
    assert not all(torch.equal(drawn[name], window[name]) for name in drawn)
