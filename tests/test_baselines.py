"""The objectives of published methods, by numbers worked out by hand, and the terms that have them.

Matching alone, GRPO and the reward's gradient alone are settings of the terms of METHOD §5; the
formulas of these papers are checked here against the functions that the terms call.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from short_runs import SHORT, cold_start, tilt
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.data.prompts import Prompt
from tiltflow.flow import fake_score_loss, renoise, velocity_target
from tiltflow.method.boundary import Boundary
from tiltflow.method.distribution_matching import decoupled_gradient, matching_gradient
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.forward_process import awm_loss, nft_loss, optimality
from tiltflow.method.policy import clipped_surrogate, group_advantages, window_steps
from tiltflow.method.reward_backprop import reward_gradient
from tiltflow.setup.build import build_stage
from tiltflow.tasks.train import run_training
from tiltflow.training.cold_start import ColdStart, Cycle
from tiltflow.training.decoupled import Decoupled
from tiltflow.training.parts import Parts
from tiltflow.training.updates import Share

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


def test_decoupled_dmd_is_its_papers_formula() -> None:
    """Decoupled DMD (2511.22677), (8): (s_real − s_fake) at τ_DM and (α − 1)(s_real − s_uncond) at
    τ_CA; the way back to s = 0 reads the data off, so each part is a difference of predictions."""
    x, s = torch.tensor([[1.0, -1.0]]), torch.zeros(1)
    noise, any_z = torch.tensor([[0.5, 0.5]]), torch.tensor([[9.0, 9.0]])
    real, uncond, fake = (torch.tensor([v]) for v in ([1.0, 2.0], [0.0, 1.0], [3.0, -2.0]))
    alpha = 3.0
    guided = uncond + alpha * (real - uncond)  # (3, 4)
    matching = (torch.tensor([0.5]), noise, any_z)
    augmenting = (torch.tensor([0.25]), -noise, any_z)
    fields = [lambda *_, v=v: v for v in (real, guided, fake)]
    g = decoupled_gradient(x, s, matching, augmenting, *fields, 0.9)
    # DM at .5: x_t = (.75, −.25), data: real (.25, −1.25), fake (−.75, .75)
    # CA at .25: x_t = (.625, −.875), data: guided (−.125, −1.875), real (.375, −1.375)
    dm, ca = (0.75 + 0.25) / 2, (1.125 + 0.875) / 2
    near(g, [[-1.0 / dm + 0.5 / ca, 2.0 / dm + 0.5 / ca]])
    # ca's part is t (α − 1)(v_real − v_uncond): .25 · 2 · (1, 1)
    rest = g - torch.tensor([[-1.0 / dm, 2.0 / dm]])
    near(rest.round(decimals=4), [[0.25 * 2 / ca] * 2])
    # on the same draws both parts, without their scales, are DMD's gradient with guidance
    ca = (abs(1 + 0.75) + abs(-1 + 2.25)) / 2  # at .5, guided: (−.75, −2.25)
    parts = decoupled_gradient(x, s, matching, matching, *fields, 0.9)
    whole = matching_gradient(x, s, *matching, fields[1], fields[2], 0.9)
    near(parts, [[-1.0 / dm + 1.0 / ca, 2.0 / dm + 1.0 / ca]])
    near(whole * ca, [[-1.0 + 1.0, 2.0 + 1.0]])


def test_phased_dmds_target_is_that_of_its_subinterval() -> None:
    """Phased DMD (2510.27684), (12) and (13), with α = 1 − σ: ψ(x_t) is fitted to
    (α_s² σ_t + α_t σ_s²)/(α_s² σ_t|s) ε − x_s/α_s, weighted by clamp(1/σ_t|s²) σ_t|s²."""
    x_s, noise = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 1.0]])
    s, t = torch.tensor([0.5]), torch.tensor([0.75])
    # α_t|s = .25/.5, σ_t|s² = .75² − (.5 · .5)² = .5; (.25 · .75 + .25 · .25)/(.25 √.5) = √2
    near(velocity_target(x_s, s, t, noise), [[0.5 * 2**0.5 - 4, 2**0.5 + 2]])
    near(renoise(x_s, s, t, noise), [[1 + 0.5 * 0.5**0.5, -0.5 + 0.5**0.5]])
    v = torch.zeros(1, 2)
    near(
        fake_score_loss(v, x_s, s, t, noise),
        [((0.5 * 2**0.5 - 4) ** 2 + (2**0.5 + 2) ** 2) / 2],  # 10 σ_t|s² = 5, clamped
    )


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


def stage_1(out: Path, *more: str) -> dict[str, Tensor]:
    """The generator's weights after 8 iterations of the mixture's stage 1."""
    chosen = [f"run.out={out}", *SHORT, "train.steps=8", "cold_start.generator_every=1", *more]
    run_training(load_config("mixture_cold_start", chosen), Console(quiet=True))
    return dict(load_checkpoint(out).tensors["generator"])


PHASED = ("cold_start.boundary_order=phased", "cold_start.phase=2")


@pytest.mark.long
def test_a_phase_has_one_boundary_for_both_networks(tmp_path: Path) -> None:
    cfg = load_config("mixture_cold_start", [f"run.out={tmp_path}", *SHORT, *PHASED])
    stage = build_stage(cfg).stage
    assert isinstance(stage, ColdStart)
    found = [stage.stops(Cycle.of(step, 1, 4)) for step in range(10)]
    assert found == [[1], [1], [2], [2], [3], [3], [4], [4], [4], [4]]
    assert stage._fresh(2, stage.prompts.select([0] * 8, torch.device("cpu"))[0])[1] == 2


def test_phases_go_on_where_they_stopped(tmp_path: Path) -> None:
    own = ("train.fake_scores=per_boundary", *PHASED)
    own += ("train.schedule=constant",)
    whole = stage_1(tmp_path / "whole", *own)
    stage_1(tmp_path / "parts", *own, "train.steps=4")
    resumed = stage_1(tmp_path / "parts", *own, "run.resume=true")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    drawn = stage_1(tmp_path / "drawn", *own, "cold_start.boundary_order=random")
    assert not all(torch.equal(whole[name], drawn[name]) for name in whole)


def test_without_guidance_decoupled_dmd_is_dmd(tmp_path: Path) -> None:
    """The mixture's teacher has none: the augmentation is exactly 0."""
    plain = stage_1(tmp_path / "plain")
    decoupled = stage_1(tmp_path / "decoupled", "cold_start.objective=decoupled")
    assert all(torch.equal(plain[name], decoupled[name]) for name in plain)


@dataclasses.dataclass
class Seen:
    """A field that keeps the levels that it was asked at; by guidance it says another velocity."""

    levels: list[Tensor] = dataclasses.field(default_factory=list)
    k: int | None = None

    def at(self, k: int | None) -> Seen:
        return self

    def field(self, cond: object, guidance: float | None = None):  # type: ignore[no-untyped-def]
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 3.0:
                self.levels.append(t)
            return x * (1.0 if guidance is None else guidance)

        return velocity


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_augmentation_is_re_noised_below_its_step(k: int, cold: Path) -> None:
    """τ_CA > t in the paper's direction of time: between σ_k and σ_k₋₁; and a rank's rows, in
    micro-batches, have the whole batch's draws."""
    stage = build_stage(load_config(str(cold / "config.yaml"), ["run.resume=false"])).stage
    n, seen = 64, Seen()
    share = Share(n, n)
    own = dataclasses.replace(
        stage.matching, teacher=seen, fake_score=Seen(), share=share, guidance=3.0
    )
    cond = stage.roles.generator.backbone.encode([""] * n)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    at = Boundary(x, stage.sigmas[k].expand(n), k, cond, [Prompt("")] * n)
    g = Decoupled(dataclasses.replace(_parts(stage), matching=own)).gradient("m", 3, at)
    (levels,) = seen.levels
    low, high = float(stage.sigmas[k]) + 0.01, float(stage.sigmas[k - 1])
    assert low - 1e-6 <= levels.min() < levels.max() <= min(high, 0.98) + 1e-6
    assert levels.max() - levels.min() > 0.8 * (min(high, 0.98) - max(low, 0.02))
    small = dataclasses.replace(own, share=Share(n, 16))
    again = Decoupled(dataclasses.replace(_parts(stage), matching=small)).gradient("m", 3, at)
    assert torch.equal(g, again)


def _parts(stage: object) -> Parts:
    names = [field.name for field in dataclasses.fields(Parts)]
    return Parts(**{name: getattr(stage, name) for name in names})


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
