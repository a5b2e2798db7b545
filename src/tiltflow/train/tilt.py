"""Stage 2: reward-tilted training with the hybrid policy gradient (METHOD §5)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import Prompt, PromptSampler
from tiltflow.method.distribution_matching import matching_loss
from tiltflow.method.policy import (
    choose_steps,
    clipped_surrogate,
    group_advantages,
    policy_kl,
    standing_out,
)
from tiltflow.method.reward_backprop import equal_norm, in_equal_parts
from tiltflow.method.rollout import Rollout, attach, attach_from, log_prob, pinned
from tiltflow.method.rollout import step as sampler_step
from tiltflow.models.backbone import Grouped
from tiltflow.models.graphs import recorded
from tiltflow.models.roles import Roles
from tiltflow.rewards.combine import RewardMixture
from tiltflow.train.averaging import Averaging
from tiltflow.train.optim import Guard, Updater
from tiltflow.train.scoring import Scored, Scorer
from tiltflow.train.tilt_settings import TiltSettings
from tiltflow.train.updates import (
    FakeScoreTrainer,
    Matching,
    Share,
    rollout_in_parts,
)


@dataclass(frozen=True)
class Counts:
    """How many times each sample counts (b,), and a sample that does (0-d)."""

    each: Tensor
    most: Tensor


Graphs = dict[int, list[tuple[Tensor, Tensor]]]
"""Mean and std of sampler steps, with their graphs, by micro-batches."""


def _counted(losses: Tensor, counts: Counts | None, rows: slice) -> Tensor:
    return losses if counts is None else losses * counts.each[rows]


@dataclass(frozen=True)
class Tilt:
    """One stage-2 epoch: rollouts, rewards, fake-score updates, one generator update.

    The global batch is one rollout in groups of `settings.group_size`. A group may lie on several
    ranks: rewards are gathered, so that advantages see whole groups.
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
    share: Share
    ema: Averaging
    settings: TiltSettings

    @property
    def updaters(self) -> dict[str, Updater]:
        return {"generator": self.updater, "fake_score": self.fake.updater}

    @property
    def guard(self) -> Guard:
        return self.updater.guard

    @recorded
    def iteration(self, step: int) -> dict[str, Tensor]:
        """Runs epoch `step` (0, 1, …); metrics are detached 0-d tensors, this rank's share."""
        chosen = self.settings
        cond, prompts = self._prompts(step)
        trained = self._trained_steps(step)
        trajectory, graphs = self._rollout(step, trained, cond)
        scored, metrics = self._scored_and_fake_scores(step, trajectory, prompts)
        labels = self._labels(step)
        advantages, parts = group_advantages(
            scored.scores, self.rewards.weights, chosen.group_size, chosen.advantage_clip, labels
        )
        counts = self._counts(scored, labels)
        means = {f"reward/{name}": values.mean() for name, values in scored.scores.items()}
        metrics |= {name: self.share.whole(value) for name, value in (means | parts).items()}
        return metrics | self._generator_update(
            step, trajectory, trained, advantages[self.share.rows], prompts, scored, counts, graphs
        )

    def _labels(self, step: int) -> list[int] | None:
        """A number for each of the global batch's groups, the same for groups of the same text."""
        if not self.settings.merge_same_prompts:
            return None
        groups = self.share.batch // self.settings.group_size
        each = self.sampler.indices(step * groups, groups)
        texts = [self.prompts.prompts[index].text for index in each]
        return [texts.index(text) for text in texts]

    def _counts(self, scored: Scored, labels: list[int] | None) -> Counts | None:
        """How many times each of this rank's samples counts where some are left out: the others
        make up the mean."""
        chosen = self.settings
        if not chosen.drop_zero_advantages:
            return None
        kept = standing_out(scored.scores, self.rewards.weights, chosen.group_size, labels)
        most = self.share.batch / kept.sum()
        return Counts(kept[self.share.rows] * most, most)

    @property
    def _scorer(self) -> Scorer:
        return Scorer(
            self.rewards,
            self.roles.generator.backbone.decode,
            self.share,
            self.settings.reward_target,
            self.settings.decode_chunk,
            self.settings.round_images,
            self.roles.generator.backbone.medium,
        )

    def _prompts(self, step: int) -> tuple[Grouped, list[Prompt]]:
        """The prompts of this rank's rows, each of them as often as its group has members here."""
        size, rows = self.settings.group_size, self.share.rows
        groups = self.share.batch // size
        first = rows.start // size
        indices = self.sampler.indices(step * groups, groups)[first : -(-rows.stop // size)]
        each, prompts = self.prompts.select(indices, self.roles.generator.backbone.device)
        begin = rows.start - first * size
        cond = Grouped(each, size, begin, len(self.share))
        return cond, [prompts[row // size] for row in range(begin, begin + len(self.share))]

    @property
    def _last(self) -> int:
        return len(self.sigmas) - 2

    @property
    def _path(self) -> range:
        """The last steps, which the reward is back-propagated through; empty if it is not."""
        backprop = self.settings.reward_weight > 0 and self.rewards.has_differentiable
        steps = self.settings.reward_steps if backprop else 0
        return range(self._last + 1 - steps, self._last + 1)

    def _trained_steps(self, step: int) -> tuple[int, ...]:
        """The M of the K − 1 stochastic steps that this epoch trains by the policy gradient.

        Steps that the reward is back-propagated through are not among them: one step has one
        gradient of the reward.
        """
        if self.settings.policy_weight == 0:
            return ()
        order = self.randomness.permutation("subset", step, min(self._last, self._path.start))
        return choose_steps(order, self.settings.subset)

    def _rollout(
        self, step: int, trained: tuple[int, ...], cond: Grouped
    ) -> tuple[Rollout, Graphs]:
        """K steps of this rank's rows; untrained steps share their noise within a group. With it
        the graphs of the steps that the generator's update goes through, if they are kept."""
        drawn = partial(
            self.share.noise,
            self.randomness,
            step=step,
            shape=self.latent_shape,
            device=self.roles.generator.backbone.device,
        )
        x, group = drawn("init"), self.settings.group_size
        noise = [drawn(f"step{k}", group=1 if k in trained else group) for k in range(self._last)]
        steps = self._attached(trained, self._matched_steps(step))
        graphs: Graphs = {k: [] for k in steps} if self.settings.keep_graph else {}
        made = rollout_in_parts(
            self.share,
            self.roles.generator,
            x,
            self.sigmas,
            cond,
            self.eta,
            noise,
            record=trained,
            convention=self.settings.log_prob,
            keep=self._kept(step, trained),
            graphs=graphs,
        )
        return made, graphs

    def _kept(self, step: int, trained: tuple[int, ...]) -> set[int]:
        """The states that the updates of this epoch look at."""
        steps = self._attached(trained, self._matched_steps(step))
        every = self.settings.match_steps != "last"
        boundaries = range(1, self._last + 2) if every else (self._last + 1,)
        return {*steps, *(k + 1 for k in steps), *self._path, *boundaries}

    def _attached(self, trained: tuple[int, ...], matched: Collection[int]) -> set[int]:
        """The sampler steps that some term of the generator's loss goes through."""
        return {*trained, *matched, *(self._path if len(self._path) == 1 else ())}

    def _scored_and_fake_scores(
        self, step: int, trajectory: Rollout, prompts: Sequence[Prompt]
    ) -> tuple[Scored, dict[str, Tensor]]:
        """The samples' rewards, and φ's updates on the rollout's own boundary samples: the last,
        or a random one a sample (a random one for all where each boundary has its own fake score).

        Rewards that compute elsewhere do so while the first update's gradient is computed. Until
        all scores are there nothing has changed, so that an iteration may be given up.
        """
        metrics: dict[str, Tensor] = {}
        updates = self.settings.fake_score_updates
        with self._scorer.begin(trajectory.end, prompts, bool(self._path)) as scoring:
            try:
                if updates:
                    metrics = self._fake_score_gradient(step, 0, trajectory, prompts)
                scored = scoring.finish(step)
            except BaseException:
                self.fake.updater.drop()
                raise
        for update in range(updates):
            if update:
                metrics = self._fake_score_gradient(step, update, trajectory, prompts)
            metrics |= self.fake.apply(step)
        return scored, metrics

    def _fake_score_gradient(
        self, step: int, update: int, trajectory: Rollout, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        draw = step * self.settings.fake_score_updates + update
        x_s, s, boundary = self._boundaries(draw, trajectory)
        return self.fake.accumulate(draw, x_s, s, trajectory.cond, prompts, boundary)

    def _boundaries(self, draw: int, trajectory: Rollout) -> tuple[Tensor, Tensor, int | None]:
        """Boundary samples, their levels and, if they have one in common, their boundary, for one
        fake-score update."""
        end, last = trajectory.end, self._last + 1
        if self.settings.match_steps == "last":
            return end, trajectory.level(last), last
        if self.roles.fake_score.boundaries:
            one = 1 + int(self.randomness.integers("fake/boundary", draw, 0, last, (1,)))
            return trajectory.states[one], trajectory.level(one), one
        which = self.randomness.integers("fake/boundary", draw, 0, last, (self.share.batch,))
        at = self.share.of(which, end.device)
        x_s = end
        for k in range(self._last):  # one at a time: a stack would hold all of them once more
            here = (at == k).view(-1, *[1] * (end.ndim - 1))
            x_s = torch.where(here, trajectory.states[k + 1], x_s)
        return x_s, trajectory.sigmas[1:][at], None

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
        scored: Scored,
        counts: Counts | None,
        graphs: Graphs,
    ) -> dict[str, Tensor]:
        """One optimizer step on SubGRPO + AC-DMD + reward back-propagation.

        Each sampler step that some term needs is run once with gradient, unless its graph was
        kept, and its graph freed before the next.
        """
        summed = self.settings.policy_reduction == "sum"
        whole = self.share.batch * (len(trained) + 1 if summed else 1)
        over = 1 if summed else len(trained)
        matched = self._matched(step, trajectory)
        steps = self._attached(trained, matched)
        path = self._path
        gradient, seen = self._reward_gradient(scored, prompts)
        metrics = {name: values.sum() / self.share.batch for name, values in seen.items()}
        for rows in self.share.micro_batches():
            part = trajectory.rows(rows)
            for k in sorted(steps):
                x_next, mean, std = self._step(part, k, graphs)
                losses = x_next.new_zeros(len(x_next))
                if k in trained:
                    policy, seen = self._policy_loss(part, k, mean, std, advantages[rows])
                    self.updater.watch("the policy loss", policy, prompts[rows])
                    losses = losses + self.settings.policy_weight * policy / over
                    self.share.add(metrics, seen)
                if k in matched:
                    matching = matching_loss(x_next, matched[k][rows])
                    self.updater.watch("the matching loss", matching, prompts[rows])
                    losses = losses + self.settings.matching_weight * matching
                    self.share.add(metrics, {"generator/matching": matching.detach()})
                if len(path) == 1 and k in path:
                    assert gradient is not None
                    losses = losses + self._reward_pull(x_next, gradient[rows])
                (_counted(losses, counts, rows).sum() / whole).backward()
            if len(path) > 1:
                most = self._most(part.end, whole, counts)
                x0 = attach_from(self.roles.generator, part, path.start, most)
                assert gradient is not None
                pull = self._reward_pull(x0, gradient[rows])
                (_counted(pull, counts, rows).sum() / whole).backward()
        metrics["generator/grad_norm"] = self.share.whole(self.updater.apply(step))
        if counts is not None:
            metrics["policy/kept"] = self.share.whole(1 / counts.most)
        self.roles.update_ema(self.ema.at(step + 1), self.guard.refused(step))
        return metrics

    def _matched(self, step: int, trajectory: Rollout) -> dict[int, Tensor]:
        """The matching gradient at the end of each matched step."""
        return {
            k: self.matching.gradient(
                f"matching{k}",
                step,
                trajectory.states[k + 1],
                trajectory.level(k + 1),
                trajectory.cond,
                k + 1,
            )
            for k in self._matched_steps(step)
        }

    def _step(self, part: Rollout, k: int, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Step k of a micro-batch with its graph: (x_{k+1}, mean, std)."""
        if k not in graphs:
            return attach(self.roles.generator, part, k)
        mean, std = graphs[k].pop(0)
        return pinned(part, k, mean), mean, std

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
            kl = policy_kl(mean, reference, std, self.settings.kl_form or self.settings.log_prob)
            losses = losses + self.settings.kl * kl
            seen["policy/kl"] = kl.detach()
        return losses, seen

    def _most(self, x0: Tensor, whole: int, counts: Counts | None) -> float | Tensor | None:
        """The norm that a normalised reward gradient has in the loss, and may have on its way."""
        if not self.settings.reward_normalise:
            return None
        one = self.settings.reward_weight / whole * equal_norm(x0)
        return one if counts is None else one * counts.most

    def _reward_gradient(
        self, scored: Scored, prompts: Sequence[Prompt]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the reward's losses have as gradient in x̂₀ (b, ...), and figures of it (b,).

        A gradient that is not finite has the updater refuse the step, on every rank.
        """
        if scored.gradient is None or scored.losses is None:
            return None, {}
        gradient = scored.gradient
        norms = gradient.flatten(1).norm(dim=1)
        self.updater.watch("the reward's gradient", norms, prompts)
        seen = {"generator/reward_loss": scored.losses, "generator/reward_gradient": norms}
        return in_equal_parts(gradient) if self.settings.reward_normalise else gradient, seen

    def _reward_pull(self, x0: Tensor, gradient: Tensor) -> Tensor:
        """A per-sample loss (B,) whose gradient in x̂₀ is `gradient`, weighted."""
        return self.settings.reward_weight * (x0 * gradient).flatten(1).sum(1)
