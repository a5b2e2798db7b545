"""Our counted draws in the order in which the authors' trainers draw, and what hands them over.

A draw of ours is a function of seed, stream and step, so that it can be had before or after our
own iteration. Each is named here a second time: were one forgotten or another, the two iterations
would differ by far more than a rounding.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

from support.reference_parts import HostTorch
from tiltflow.training.cold_start import ColdStart, Cycle
from tiltflow.training.parts import Parts
from tiltflow.training.tilt import Tilt
from tiltflow.training.updates import FakeScoreTrainer

Draw = tuple[str, Tensor]
"""The function of torch that they draw it with, and its value."""


class Fed(HostTorch):
    """torch whose draws are given, in their order; `left` are those that nobody has asked for.

    A permutation, which they shuffle a rollout's samples with, leaves all in place.
    """

    def __init__(self, draws: list[Draw]) -> None:
        self.left = draws

    def _next(self, kind: str, *args: Any, **_: Any) -> Tensor:
        named, value = self.left.pop(0)
        assert kind == named, f"they draw by {kind} where our next draw is one by {named}"
        if kind.endswith("_like"):
            assert args[0].shape == value.shape, f"{kind} of {tuple(args[0].shape)}"
        return value.clone()

    rand, rand_like = partialmethod(_next, "rand"), partialmethod(_next, "rand_like")
    randn, randn_like = partialmethod(_next, "randn"), partialmethod(_next, "randn_like")
    randint = partialmethod(_next, "randint")

    def randperm(self, n: int, **_: Any) -> Tensor:
        return torch.arange(n)


def cold_start_draws(stage: ColdStart, step: int) -> list[Draw]:
    """Of an iteration of stage 1 with both updates."""
    cycle = Cycle.of(step, 1, stage.settings.generator_every)
    return [
        *_rollout(stage, "", cycle.number, stage.stops(cycle)[0]),
        *_fake_score(stage, step, "rand"),
        *_rollout(stage, "fresh/", step, stage._stop("fresh/stop", step)),
        *_matching(stage, "matching", step, "rand"),
    ]


def tilt_draws(stage: Tilt, step: int) -> tuple[list[Draw], list[Tensor]]:
    """Of an epoch of stage 2, and the noise of each sampler step, the last's with no weight."""
    trained, size = stage.policy.explores(step), stage.settings.group_size
    last = stage.steps - 1
    steps = [noise(stage, f"step{k}", step, 1 if k in trained else size) for k in range(last)]
    steps.append(torch.zeros_like(steps[0]))
    draws = [
        ("randn", noise(stage, "init", step)),
        *_fake_score(stage, step, "rand_like"),
        ("randn_like", steps[-1]),
        *_matching(stage, f"matching{last}", step, "rand_like"),
    ]
    return draws, steps


def noise(stage: Parts, stream: str, step: int, group: int = 1) -> Tensor:
    shape, device = stage.latent_shape, torch.device("cpu")
    return stage.share.noise(stage.randomness, stream, step, shape, device, group=group)


def _rollout(stage: ColdStart, prefix: str, number: int, stop: int) -> list[Draw]:
    """The number of its steps, the start, and each step's noise but that of the sampler's last."""
    steps = range(min(stop, stage.steps - 1))
    streams = [f"{prefix}init", *(f"{prefix}step{k}" for k in steps)]
    first = ("randint", torch.tensor([stop]))
    return [first, *(("randn", noise(stage, stream, number)) for stream in streams)]


def _fake_score(stage: Parts, step: int, level: str) -> list[Draw]:
    """Levels and noise, and of the consistency δ and two noises; they draw levels by `level`."""
    batch, fake = (stage.share.batch,), stage.fake
    assert isinstance(fake, FakeScoreTrainer)
    delta = stage.randomness.integers("fake/delta", step, 1, fake.max_delta + 1, batch)
    return [
        (level, stage.randomness.uniform("fake/t", step, batch)),
        ("randn_like", noise(stage, "fake/noise", step)),
        ("randint", delta),
        ("randn_like", noise(stage, "fake/a", step)),
        ("randn_like", noise(stage, "fake/b", step)),
    ]


def _matching(stage: Parts, stream: str, step: int, level: str) -> list[Draw]:
    return [
        (level, stage.randomness.uniform(f"{stream}/t", step, (stage.share.batch,))),
        ("randn_like", noise(stage, f"{stream}/noise", step)),
        ("randn_like", noise(stage, f"{stream}/z", step)),
    ]
