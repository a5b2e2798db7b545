"""The generator's loss of stage 2 as published, by hand in fp64; advantages; what rewards see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiltflow.method.policy import group_advantages, standing_out
from tiltflow.method.rollout import NO_GRAPHS, Rollout, log_prob, step
from tiltflow.models.backbone import Conditioning
from tiltflow.models.roles import Role, Roles
from tiltflow.rewards.combine import RewardMixture, Weighted
from tiltflow.training.averaging import Averaging
from tiltflow.training.optim import Guard
from tiltflow.training.own_terms import Figures
from tiltflow.training.scoring import Scored, Scorer
from tiltflow.training.settings import TiltConfig
from tiltflow.training.terms import Epoch, Match, Policy, Pull, single
from tiltflow.training.tilt import Counts, Tilt
from tiltflow.training.updates import Share


class Toy:
    """Points of two coordinates with the velocity w ⊙ x + u, in fp64."""

    device, latent_shape = torch.device("cpu"), (2,)

    def velocity(self, network: Any, x: Any, sigma: Any, cond: Any, guidance: Any) -> Any:
        assert guidance is None
        return network.w * x + network.u


class Recorder:
    """An updater that keeps the gradient."""

    def __init__(self, role: Role) -> None:
        self.parameters, self.guard = list(role.parameters.values()), Guard()

    def watch(self, term: str, values: torch.Tensor, prompts: Any) -> None:
        assert bool(torch.isfinite(values).all())

    def apply(self, step: int) -> torch.Tensor:
        self.found = [p.grad.clone() for p in self.parameters if p.grad is not None]
        for p in self.parameters:
            p.grad = None
        return torch.zeros(())


def toy(**choices: Any) -> tuple[Tilt, Rollout, Role]:
    network = torch.nn.Module()
    network.w = torch.nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    network.u = torch.nn.Parameter(torch.tensor([0.2, 0.5], dtype=torch.float64))
    role = Role("generator", Toy(), network, parameters=dict(network.named_parameters()))  # type: ignore[arg-type]
    roles = Roles(role, role, role, SimpleNamespace(parameters={}, name="ema"))  # type: ignore[arg-type]
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    states = {k: torch.randn(4, 2, generator=draw, dtype=torch.float64) for k in range(5)}
    empty = Conditioning({"none": torch.zeros(4, 0)}, {"none": torch.zeros(4, 0)})
    records = {}
    for k in (0, 2):
        mean, std = step(role, states[k], sigmas, k, empty, 0.9)
        records[k] = log_prob(states[k + 1], mean, std).detach()
    trajectory = Rollout(sigmas, states, empty, 0.9, records)
    gap = torch.tensor([[1.0, -2.0], [0.5, 0.25], [-1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    reward = FakeReward()
    settings = TiltConfig(group_size=2, subset=2, **choices)
    # the trained steps are the first and the third
    randomness = SimpleNamespace(permutation=lambda *a: torch.tensor([2, 0, 1]))
    matching = SimpleNamespace(gradient=lambda *a: gap)
    policy = Policy(settings, roles, randomness, stop=3)  # type: ignore[arg-type]
    stage = Tilt(
        roles=roles,
        prompts=None,  # type: ignore[arg-type]
        sampler=None,  # type: ignore[arg-type]
        randomness=randomness,  # type: ignore[arg-type]
        rewards=RewardMixture([Weighted(reward, 1.0, True)]),
        fake=None,  # type: ignore[arg-type]
        matching=matching,  # type: ignore[arg-type]
        updater=Recorder(role),  # type: ignore[arg-type]
        sigmas=sigmas,
        latent_shape=(2,),
        eta=0.9,
        share=Share(4, 2),
        ema=Averaging(0.9),
        settings=settings,
        scorer=None,  # type: ignore[arg-type]
        policy=policy,
        terms=(
            policy,
            Match(settings, matching, randomness, 4),  # type: ignore[arg-type]
            Pull(settings, single(3)),
        ),
    )
    return stage, trajectory, role


class FakeReward:
    name, differentiable, domain = "points", True, "images"

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        return images.flatten(1).sum(1)


ADVANTAGES = torch.tensor([1.5, -0.5, 0.25, -2.0], dtype=torch.float64)
PULL = torch.tensor([[0.1, 0.2], [-0.3, 0.4], [0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
GAP = torch.tensor([[1.0, -2.0], [0.5, 0.25], [-1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)


def by_hand(
    trajectory: Rollout, role: Role, each: torch.Tensor, policy: float, whole: float
) -> list[torch.Tensor]:
    """The gradient of [policy · Σ_k L_policy + 1e-3 L_match + 1e-4 L_reward]/whole, from (2.1)."""
    w, u = role.parameters["w"], role.parameters["u"]
    cos = torch.cos(torch.tensor(0.9 * torch.pi / 2, dtype=torch.float64))

    def mean(k: int) -> torch.Tensor:
        now, then = trajectory.sigmas[k], trajectory.sigmas[k + 1]
        x = trajectory.states[k]
        v = w * x + u
        return (1 - then) * (x - now * v) + then * cos * (x + (1 - now) * v)

    loss = torch.zeros((), dtype=torch.float64)
    for k in (0, 2):
        log = -((trajectory.states[k + 1] - mean(k)) ** 2).mean(1)
        ratio = torch.exp(log - log.detach())  # on-policy: 1
        loss = loss + policy * (each * -ratio * ADVANTAGES).sum()
    loss = loss + 1e-3 * (each * (mean(3) * GAP).mean(1)).sum()
    loss = loss + 1e-4 * (each * (mean(3) * PULL).sum(1)).sum()
    return list(torch.autograd.grad(loss / 4 / whole, [w, u]))


@pytest.mark.parametrize(("reduction", "policy", "whole"), [("sum", 1.0, 3.0), ("mean", 0.5, 1.0)])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_generators_gradient_is_the_published_sum_or_the_mean(
    reduction: str, policy: float, whole: float, dropped: bool
) -> None:
    stage, trajectory, role = toy(policy_reduction=reduction, drop_zero_advantages=dropped)
    each = torch.ones(4, dtype=torch.float64)
    counts = None
    if dropped:  # the third sample is left out: the mean is over the other three
        each = torch.tensor([4 / 3, 4 / 3, 0.0, 4 / 3], dtype=torch.float64)
        counts = Counts(each, torch.tensor(4 / 3))
    scored = Scored({}, torch.zeros(4), PULL)
    epoch = Epoch(0, trajectory, ["p"] * 4, scored, ADVANTAGES)  # type: ignore[list-item]
    spans = {term: term.spans(0) for term in stage.terms}
    stage._generator_update(epoch, spans, counts, NO_GRAPHS, Figures(stage.share, ()))
    expected = by_hand(trajectory, role, each, policy, whole)
    for found, right in zip(stage.updater.found, expected, strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-15)


def test_groups_of_one_text_have_their_mean_together() -> None:
    rewards = {"r": torch.tensor([0.0, 2.0, 1.0, 1.0, 4.0, 6.0])}
    apart, seen = group_advantages(rewards, {"r": 1.0}, 2)
    same, _ = group_advantages(rewards, {"r": 1.0}, 2, labels=[0, 1, 2])
    assert torch.equal(apart, same) and seen["policy/flat_groups/r"].item() == pytest.approx(1 / 3)
    together, seen = group_advantages(rewards, {"r": 1.0}, 2, labels=[0, 1, 0])
    scaled = torch.tensor([-3.0, -1.0, 0.0, 0.0, 1.0, 3.0])  # of 0, 2, 4, 6 the mean is 3
    scaled = scaled / (rewards["r"].std(unbiased=False) + 1e-4)
    torch.testing.assert_close(together, scaled / (scaled.std(unbiased=False) + 1e-4))
    flat, seen = group_advantages(
        {"r": torch.tensor([1.0, 1.0, 2.0, 2.0])}, {"r": 1.0}, 2, 5.0, [0, 0]
    )
    assert flat.abs().min() > 0.9 and seen["policy/flat_groups/r"].item() == 0
    with pytest.raises(ValueError, match="2 labels are given for 3 groups"):
        group_advantages(rewards, {"r": 1.0}, 2, labels=[0, 0])


def test_samples_that_no_reward_tells_apart_are_left_out() -> None:
    rewards = {"a": torch.tensor([0.1, 0.1, 0.0, 1.0]), "b": torch.tensor([0.3, 0.3, 0.7, 0.7])}
    weights = {"a": 1.0, "b": 1.0}
    assert standing_out(rewards, weights, 2).tolist() == [0, 0, 1, 1]
    rewards["b"] = torch.tensor([0.3, 0.4, 0.7, 0.7])
    assert standing_out(rewards, weights, 2).tolist() == [1, 1, 1, 1]
    nothing = {"a": torch.full((4,), 0.1)}
    assert standing_out(nothing, {"a": 1.0}, 2).tolist() == [1, 1, 1, 1]


def test_scores_are_of_the_rounded_image_and_the_gradient_of_the_image() -> None:
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    class Square(FakeReward):
        def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
            return images.square().flatten(1).sum(1)

    mixture = RewardMixture([Weighted(Square(), 1.0, True)])
    prompts = [SimpleNamespace(text="p", metadata={})] * 4
    found = []
    for rounded in (True, False):
        scorer = Scorer(mixture, lambda x: x, Share(4, 2), 100.0, 2, rounded)
        with scorer.begin(images, prompts, True) as scoring:  # type: ignore[arg-type]
            found.append(scoring.finish(0))
    eight = (images * 255).round() / 255
    torch.testing.assert_close(found[0].scores["points"], eight.square().flatten(1).sum(1))
    assert torch.equal(found[1].scores["points"], images.square().flatten(1).sum(1))
    for one in found:
        torch.testing.assert_close(one.gradient, -2 * images)
