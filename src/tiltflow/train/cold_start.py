"""Stage 1: Ambient-Consistent Distribution Matching Distillation (METHOD §4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tiltflow.backbones.base import Conditioning
from tiltflow.embeddings import EncodedPrompts
from tiltflow.objectives.distribution_matching import matching_loss
from tiltflow.prompts import Prompt, PromptSampler
from tiltflow.randomness import Randomness
from tiltflow.roles import Roles
from tiltflow.rollout import Rollout, attach, join, rollout
from tiltflow.train.optim import Updater
from tiltflow.train.updates import FakeScoreTrainer, Matching, Share


@dataclass(frozen=True)
class ColdStart:
    """One stage-1 iteration: a fake-score update, and every `generator_every`-th a generator one.

    Both use the iteration's boundary samples, which 1 to K generator steps from noise make, the
    number drawn uniformly.
    """

    roles: Roles
    prompts: EncodedPrompts
    sampler: PromptSampler
    randomness: Randomness
    fake: FakeScoreTrainer
    matching: Matching
    updater: Updater
    sigmas: Tensor
    latent_shape: tuple[int, ...]
    eta: float
    share: Share
    generator_every: int
    ema: float

    @property
    def updaters(self) -> dict[str, Updater]:
        return {"generator": self.updater, "fake_score": self.fake.updater}

    def iteration(self, step: int) -> dict[str, Tensor]:
        """Runs iteration `step` (0, 1, …); metrics are detached 0-d tensors, this rank's share."""
        first = step * self.share.batch + self.share.rows.start
        indices = self.sampler.indices(first, len(self.share))
        cond, prompts = self.prompts.select(indices, self.roles.generator.backbone.device)
        stop = int(self.randomness.integers("stop", step, 1, len(self.sigmas), (1,)))
        trajectory = self._boundary(step, stop, cond)
        x_s, s = trajectory.states[-1], trajectory.level(stop)
        metrics = self.fake.update(step, step, x_s, s, cond, prompts)
        if (step + 1) % self.generator_every == 0:
            metrics |= self._generator_update(step, trajectory, prompts)
        return metrics

    def _boundary(self, step: int, stop: int, cond: Conditioning) -> Rollout:
        """`stop` generator steps from noise, all of this rank's rows, without gradient."""
        shape, random = (self.share.batch, *self.latent_shape), self.randomness
        device = self.roles.generator.backbone.device
        x = self.share.of(random.normal("init", step, shape), device)
        noise = [self.share.of(random.normal(f"step{k}", step, shape), device) for k in range(stop)]
        parts = []
        for rows in self.share.micro_batches():
            z = [n[rows] for n in noise]
            parts.append(
                rollout(
                    self.roles.generator,
                    x[rows],
                    self.sigmas,
                    cond[rows],
                    self.eta,
                    z.__getitem__,
                    stop=stop,
                )
            )
        return join(parts, cond)

    def _generator_update(
        self, step: int, trajectory: Rollout, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """The matching gradient carried through the last executed step only."""
        last = trajectory.steps - 1
        x_s, s = trajectory.states[-1], trajectory.level(last + 1)
        gradient = self.matching.gradient("matching", step, x_s, s, trajectory.cond)
        total = x_s.new_zeros(())
        for rows in self.share.micro_batches():
            attached, _, _ = attach(self.roles.generator, trajectory.rows(rows), last)
            losses = matching_loss(attached, gradient[rows])
            self.updater.watch("the matching loss", losses, prompts[rows])
            loss = losses.sum() / self.share.batch
            loss.backward()
            total += loss.detach()
        norm = self.share.whole(self.updater.apply(step))
        self.roles.update_ema(self.ema)
        return {"generator/matching": total, "generator/grad_norm": norm}
