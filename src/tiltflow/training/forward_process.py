"""Builtin terms on the forward process: DiffusionNFT (`nft`) and Advantage Weighted Matching
(`awm`), published baselines that need no log-probability of a sampler's step.

Each re-noises the rollout's end and runs the generator there. One optimizer step follows a
rollout, so that the sampling policy is the generator itself without its gradient, and takes no pass
of its own; DiffusionNFT's slower sampling policy is not built.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tiltflow.core.settings import Rate, Section, Steps, Weight
from tiltflow.flow import interpolate, renoise_level
from tiltflow.method.forward_process import awm_loss, nft_loss, optimality
from tiltflow.training.parts import Parts
from tiltflow.training.terms import Attached, Epoch, Loss, Span, Term


class ForwardSettings(Section):
    """`draws`: levels t of each sample, U(.01, 1) clamped to [.02, .98] (METHOD §4)."""

    weight: Weight = 1.0
    draws: Steps = 1


class ForwardProcess(Term):
    """weight · the mean over `draws` levels of the loss at the rollout's end, re-noised."""

    stream: str
    settings: ForwardSettings

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @abstractmethod
    def compare(self, velocity: Tensor, target: Tensor, advantages: Tensor) -> Tensor:
        """The loss (b,) of the generator's velocity against n − x₀."""

    @classmethod
    def passes(cls, steps: int, **settings: object) -> int:
        chosen = settings["settings"]
        assert isinstance(chosen, ForwardSettings)
        return chosen.draws

    def spans(self, step: int) -> tuple[Span, ...]:
        return (Span(self.parts.steps, self.parts.steps),) if self.settings.weight else ()

    def begin(self, epoch: Epoch) -> Loss:
        drawn = [self._drawn(epoch, n) for n in range(self.settings.draws)]

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            total = torch.zeros(len(at.x), device=at.x.device)
            for t, noise in drawn:
                level, n = t[at.rows], noise[at.rows]
                x_t = interpolate(at.x, n, level)
                velocity = self.parts.roles.generator(x_t, level, at.part.conditioning)
                total = total + self.compare(velocity, n - at.x, epoch.advantages[at.rows])
            total = total / len(drawn)
            return self.settings.weight * total, {f"generator/{self.stream}": total.detach()}

        return loss

    def _drawn(self, epoch: Epoch, number: int) -> tuple[Tensor, Tensor]:
        """Levels (b,) and noises (b, ...) of this rank's rows: draw `number` of the epoch."""
        parts, end = self.parts, epoch.trajectory.end
        share, random = parts.share, parts.randomness
        count = epoch.step * self.settings.draws + number
        uniform = share.of(random.uniform(f"{self.stream}/t", count, (share.batch,)), end.device)
        noise = share.noise(random, f"{self.stream}/noise", count, end.shape[1:], end.device)
        return renoise_level(torch.zeros_like(uniform), uniform), noise


class NFT(ForwardProcess):
    """DiffusionNFT (arXiv 2509.16117) with the sampling policy as v_old."""

    name = "the NFT loss"
    stream = "nft"

    class Settings(ForwardSettings):
        """`beta`: β; `scale`: the advantage at which r has reached 1 (Z)."""

        beta: Rate = 1.0
        scale: Rate = 1.0

    def __init__(self, parts: Parts, settings: Settings) -> None:
        super().__init__(parts)
        self.settings: NFT.Settings = settings

    def compare(self, velocity: Tensor, target: Tensor, advantages: Tensor) -> Tensor:
        r = optimality(advantages, self.settings.scale)
        return nft_loss(velocity, velocity.detach(), target, r, self.settings.beta)


class AWM(ForwardProcess):
    """Advantage Weighted Matching (arXiv 2509.25050) on the sampling policy."""

    name = "the AWM loss"
    stream = "awm"

    class Settings(ForwardSettings):
        """`clip_range`: ε of the clipped ratio."""

        clip_range: Rate = 1e-4

    def __init__(self, parts: Parts, settings: Settings) -> None:
        super().__init__(parts)
        self.settings: AWM.Settings = settings

    def compare(self, velocity: Tensor, target: Tensor, advantages: Tensor) -> Tensor:
        clip = self.settings.clip_range
        return awm_loss(velocity, velocity.detach(), target, advantages, clip)
