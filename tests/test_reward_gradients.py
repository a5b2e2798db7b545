"""Gradients of rewards are made as they score: of many images no graph stands."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltflow.method.reward_backprop import reward_gradient
from tiltflow.rewards.base import FunctionReward, checked, load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted

PROMPTS = ["a red circle on black", "a blue square on black", "a green circle on black"]


class Deep:
    """Forty layers of an image's size."""

    name, differentiable, at_once = "deep", True, 1

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [0.1 * torch.randn(3, 3, 3, 3, generator=generator) for _ in range(40)]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        x = images
        for layer in self.layers:
            x = nn.functional.conv2d(x, layer, padding=1).tanh()
        return x.flatten(1).mean(1)


def images(count: int = 3, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator, requires_grad=True)


@pytest.mark.parametrize("reward", ["clipscore", "deep"])
def test_a_gradient_is_autograds_own(reward: str) -> None:
    """Image by image, since several at once round otherwise; with weights, and none for a sample
    above the target."""
    one: Any = Deep() if reward == "deep" else load_reward("clipscore")
    given = images()
    weights = torch.tensor([2.0, 0.0, -0.25])
    (weights * checked(one, given, PROMPTS, [{}] * 3)).sum().backward()
    for row, weight in enumerate(weights):
        alone = given[row : row + 1].detach().clone().requires_grad_(True)
        (weight * one(alone, PROMPTS[row : row + 1], [{}])).sum().backward()
        assert alone.grad is not None and given.grad is not None
        assert torch.equal(given.grad[row], alone.grad[0]) and bool(alone.grad.any()) == bool(
            weight
        )


class Held:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_no_graph_is_kept() -> None:
    """Of two rewards it would be 2 × 40 × 2 of the images' size."""
    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> Held:
        held = Held(tensor)
        alive.add(held)
        return held

    rewards = [Deep(), Deep()]
    rewards[1].name = "other"
    mixture = RewardMixture([Weighted(one, backprop=True) for one in rewards])
    given = images(8)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.tensor):
        total, _ = mixture.differentiable_total(given, ["p"] * 8, [{}] * 8)
        assert sum(held.tensor.numel() for held in alive) <= 3 * given.numel()
        total.sum().backward()
    assert given.grad is not None and given.grad.flatten(1).any(1).all()


def test_the_reward_loss_goes_through_the_decoder() -> None:
    """The same losses and gradients as with one graph over decoder and rewards."""
    decoder = nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        return torch.sigmoid(decoder(latents))

    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    deep, plain = Deep(), Deep()
    mixture = RewardMixture([Weighted(deep, 3.0, backprop=True)])

    def through(of: Tensor, rows: slice) -> Tensor:
        return mixture.differentiable_total(of, ["p"] * len(of), [{}] * len(of))[0]

    def whole(of: Tensor, rows: slice) -> Tensor:
        return 3.0 * plain(of, [], [])

    target = float(3.0 * plain(decode(latents), [], []).median())  # some above it, some below
    ours, theirs = (reward_gradient(latents, decode, r, target, 2) for r in (through, whole))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    assert 0 < int((ours[0] == 0).sum()) < 4


def test_scores_that_do_not_depend_on_the_image_are_refused() -> None:
    """They have a gradient, of something else."""

    class Apart(Deep):
        name = "apart"
        weight = torch.ones(1, requires_grad=True)

        def __call__(self, images: Tensor, prompts: object, metadata: object) -> Tensor:
            return self.weight.expand(len(images))

    with pytest.raises(ValueError, match="reward 'apart' says that it is differentiable, but its"):
        checked(Apart(), images(), PROMPTS, [{}] * 3)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_reward_may_write_into_its_images(at_once: int) -> None:
    """They are its own copies, with a gradient as without one (docs/rewards.md)."""

    def plain(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return (images * 2 - 1).square().mean((1, 2, 3))

    def inside(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return images.mul_(2).sub_(1).square().mean((1, 2, 3))

    found = []
    for function in (plain, inside):
        reward, given = FunctionReward(function, "own", True, at_once=at_once), images()
        before = given.detach().clone()
        scores = checked(reward, given, PROMPTS, [{}] * 3)
        scores.sum().backward()
        assert given.grad is not None and torch.equal(given, before)
        found.append((scores, given.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
