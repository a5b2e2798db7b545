"""Stage 2: reward-tilted training with the hybrid policy gradient (METHOD §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.backbones.base import Grouped
from tiltflow.embeddings import EncodedPrompts
from tiltflow.objectives.distribution_matching import matching_loss
from tiltflow.objectives.policy import (
    choose_steps,
    clipped_surrogate,
    group_advantages,
    policy_kl,
    share_in_groups,
)
from tiltflow.objectives.reward_backprop import reward_gradient
from tiltflow.prompts import Prompt, PromptSampler
from tiltflow.randomness import Randomness
from tiltflow.rewards.combine import RewardMixture
from tiltflow.roles import Roles
from tiltflow.rollout import Rollout, attach, join, log_prob, rollout
from tiltflow.rollout import step as sampler_step
from tiltflow.train.optim import Updater, require_finite
from tiltflow.train.updates import FakeScoreTrainer, Matching, micro_batches

MATCH_STEPS = ("last", "random", "all")


@dataclass(frozen=True)
class TiltSettings:
    """The weights and choices of METHOD §5; `subset` is M, `group_size` G, `kl` β_KL."""

    group_size: int
    subset: int
    clip_range: float = 1e-5
    advantage_clip: float = 5.0
    kl: float = 0.0
    log_prob: str = "unit"
    policy_weight: float = 1.0
    matching_weight: float = 1e-3
    reward_weight: float = 1e-4
    reward_target: float = 3.0
    match_steps: str = "last"
    fake_score_updates: int = 1
    decode_chunk: int = 16


@dataclass(frozen=True)
class Tilt:
    """One stage-2 epoch: rollouts, rewards, fake-score updates, one generator update.

    `batch` samples a rollout in groups of `settings.group_size`, run in micro-batches of `micro`.
    """

    roles: Roles
    prompts: EncodedPrompts
    sampler: PromptSampler
    randomness: Randomness
    rewards: RewardMixture
    fake: FakeScoreTrainer
    matching: Matching
    updater: Updater
    sigmas: Tensor
    latent_shape: tuple[int, ...]
    eta: float
    batch: int
    micro: int
    ema: float
    settings: TiltSettings

    @property
    def updaters(self) -> dict[str, Updater]:
        return {"generator": self.updater, "fake_score": self.fake.updater}

    def iteration(self, step: int) -> dict[str, Tensor]:
        """Runs epoch `step` (0, 1, …); metrics are detached 0-d tensors."""
        chosen = self.settings
        groups = self.batch // chosen.group_size
        indices = self.sampler.indices(step * groups, groups)
        device = self.roles.generator.backbone.device
        each, prompts = self.prompts.select(indices, device)
        cond = Grouped(each, chosen.group_size)
        prompts = [p for p in prompts for _ in range(chosen.group_size)]
        trained = self._trained_steps(step)
        trajectory = self._rollout(step, trained, cond)
        scores = self._score(trajectory.states[-1], prompts)
        metrics = {f"reward/{name}": values.mean() for name, values in scores.items()}
        weights = {w.reward.name: w.weight for w in self.rewards.rewards}
        advantages, parts = group_advantages(
            scores, weights, chosen.group_size, chosen.advantage_clip
        )
        metrics |= parts | self._fake_score_updates(step, trajectory, prompts)
        return metrics | self._generator_update(step, trajectory, trained, advantages, prompts)

    @property
    def _last(self) -> int:
        return len(self.sigmas) - 2

    def _trained_steps(self, step: int) -> tuple[int, ...]:
        """The M of the K − 1 stochastic steps that this epoch trains."""
        if self.settings.policy_weight == 0:
            return ()
        order = self.randomness.permutation("subset", step, self._last)
        return choose_steps(order, self.settings.subset)

    def _rollout(self, step: int, trained: tuple[int, ...], cond: Grouped) -> Rollout:
        """K steps for the global batch; untrained steps share their noise within a group."""
        shape, random = (self.batch, *self.latent_shape), self.randomness
        device = self.roles.generator.backbone.device
        x = random.normal("init", step, shape, device=device)
        noise = []
        for k in range(self._last):
            z = random.normal(f"step{k}", step, shape, device=device)
            noise.append(z if k in trained else share_in_groups(z, self.settings.group_size))
        parts = []
        for rows in micro_batches(self.batch, self.micro):
            z_rows = [z[rows] for z in noise]
            parts.append(
                rollout(
                    self.roles.generator,
                    x[rows],
                    self.sigmas,
                    cond[rows],
                    self.eta,
                    z_rows.__getitem__,
                    record=trained,
                    convention=self.settings.log_prob,
                )
            )
        return join(parts, cond)

    @torch.no_grad()
    def _score(self, x0: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Every reward of every sample, decoded in chunks: name → (B,)."""
        parts = []
        for rows in micro_batches(len(x0), self.settings.decode_chunk):
            images = self.roles.generator.backbone.decode(x0[rows])
            texts, metadata = _texts(prompts[rows])
            parts.append(self.rewards.score(images, texts, metadata))
        return {name: torch.cat([p[name] for p in parts]).to(x0.device) for name in parts[0]}

    def _fake_score_updates(
        self, step: int, trajectory: Rollout, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """φ on the rollout's own boundary samples: the last, or a random one a sample."""
        metrics: dict[str, Tensor] = {}
        states = torch.stack(trajectory.states[1:])
        levels = self.sigmas[1:].to(states.device)
        for update in range(self.settings.fake_score_updates):
            draw = step * self.settings.fake_score_updates + update
            at = torch.full((self.batch,), self._last, device=states.device)
            if self.settings.match_steps != "last":
                which = self.randomness.integers(
                    "fake/boundary", draw, 0, self._last + 1, (self.batch,)
                )
                at = which.to(states.device)
            x_s = states[at, torch.arange(self.batch, device=states.device)]
            metrics = self.fake.update(step, draw, x_s, levels[at], trajectory.cond, prompts)
        return metrics

    def _matched_steps(self, step: int) -> tuple[int, ...]:
        if self.settings.matching_weight == 0:
            return ()
        if self.settings.match_steps == "all":
            return tuple(range(self._last + 1))
        if self.settings.match_steps == "random":
            at = self.randomness.integers("match/boundary", step, 0, self._last + 1, (1,))
            return (int(at),)
        return (self._last,)

    def _generator_update(
        self,
        step: int,
        trajectory: Rollout,
        trained: tuple[int, ...],
        advantages: Tensor,
        prompts: Sequence[Prompt],
    ) -> dict[str, Tensor]:
        """One optimizer step on SubGRPO + AC-DMD + reward back-propagation.

        Each sampler step that some term needs is run once with gradient, and its graph freed
        before the next.
        """
        matched = {
            k: self.matching.gradient(
                f"matching{k}",
                step,
                trajectory.states[k + 1],
                trajectory.level(k + 1),
                trajectory.cond,
            )
            for k in self._matched_steps(step)
        }
        backprop = self.settings.reward_weight > 0 and self.rewards.has_differentiable
        steps = {*trained, *matched} | ({self._last} if backprop else set())
        metrics: dict[str, Tensor] = {}
        for rows in micro_batches(self.batch, self.micro):
            part = trajectory.rows(rows)
            for k in sorted(steps):
                x_next, mean, std = attach(self.roles.generator, part, k)
                losses = x_next.new_zeros(len(x_next))
                if k in trained:
                    policy, seen = self._policy_loss(part, k, mean, std, advantages[rows])
                    require_finite(step, "the policy loss", policy, prompts[rows])
                    losses = losses + self.settings.policy_weight * policy / len(trained)
                    _add(metrics, seen, self.batch)
                if k in matched:
                    matching = matching_loss(x_next, matched[k][rows])
                    require_finite(step, "the matching loss", matching, prompts[rows])
                    losses = losses + self.settings.matching_weight * matching
                    _add(metrics, {"generator/matching": matching.detach()}, self.batch)
                if backprop and k == self._last:
                    pull, seen = self._reward_pull(step, x_next, prompts[rows])
                    losses = losses + self.settings.reward_weight * pull
                    _add(metrics, seen, self.batch)
                (losses.sum() / self.batch).backward()
        metrics["generator/grad_norm"] = self.updater.apply(step)
        self.roles.update_ema(self.ema)
        return metrics

    def _policy_loss(
        self, part: Rollout, k: int, mean: Tensor, std: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate (and KL to the stage-1 policy) of step k: (B,)."""
        now = log_prob(part.states[k + 1], mean, std, self.settings.log_prob)
        old = part.log_probs[k]
        losses = clipped_surrogate(now, old, advantages, self.settings.clip_range)
        seen = {"policy/ratio_gap": (torch.exp(now.detach() - old) - 1).abs()}
        if self.settings.kl > 0:
            assert self.roles.reference is not None
            with torch.no_grad():
                reference, _ = sampler_step(
                    self.roles.reference,
                    part.states[k],
                    part.sigmas,
                    k,
                    part.conditioning,
                    part.eta,
                )
            kl = policy_kl(mean, reference, std, self.settings.log_prob)
            losses = losses + self.settings.kl * kl
            seen["policy/kl"] = kl.detach()
        return losses, seen

    def _reward_pull(
        self, step: int, x0: Tensor, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A per-sample loss (B,) whose gradient in x̂₀ is that of relu(target − R)."""

        def reward(images: Tensor, rows: slice) -> Tensor:
            texts, metadata = _texts(prompts[rows])
            return self.rewards.differentiable_total(images, texts, metadata)[0]

        values, gradient = reward_gradient(
            x0,
            self.roles.generator.backbone.decode,
            reward,
            self.settings.reward_target,
            self.settings.decode_chunk,
        )
        require_finite(step, "the reward back-propagation loss", values, prompts)
        require_finite(step, "the reward's gradient", gradient.flatten(1).sum(1), prompts)
        seen = {
            "generator/reward_loss": values,
            "generator/reward_gradient": gradient.flatten(1).norm(dim=1),
        }
        return (x0 * gradient).flatten(1).sum(1), seen


def _texts(prompts: Sequence[Prompt]) -> tuple[list[str], list]:
    return [p.text for p in prompts], [p.metadata for p in prompts]


def _add(metrics: dict[str, Tensor], values: dict[str, Tensor], batch: int) -> None:
    """Adds per-sample values (B,) of one micro-batch to running means over the batch."""
    for name, tensor in values.items():
        share = tensor.sum() / batch
        metrics[name] = metrics[name] + share if name in metrics else share
