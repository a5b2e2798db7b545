"""Stage 2: reward-tilted training with the hybrid policy gradient (METHOD §5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tiltflow.data.prompts import Prompt
from tiltflow.method.boundary import Boundary
from tiltflow.method.policy import group_advantages, standing_out
from tiltflow.method.reward_backprop import equal_norm
from tiltflow.method.rollout import (
    NO_GRAPHS,
    Graphs,
    Kept,
    Rollout,
    attach,
    attach_from,
    go_back,
    pinned,
)
from tiltflow.models.backbone import Grouped
from tiltflow.rewards.combine import RewardMixture
from tiltflow.rewards.ranking import Groups
from tiltflow.training.optim import Updater
from tiltflow.training.own_terms import Figures
from tiltflow.training.parts import Parts, recorded
from tiltflow.training.scoring import Scored, Scorer
from tiltflow.training.settings import TiltConfig
from tiltflow.training.terms import Attached, Epoch, Policy, Span, Term
from tiltflow.training.updates import rollout_in_parts


@dataclass(frozen=True)
class Counts:
    """How many times each sample counts (b,), and a sample that does (0-d)."""

    each: Tensor
    most: Tensor


def _go_back(
    loss: Tensor,
    at: Attached,
    kept: Mapping[int, Kept],
    most: float | Tensor | None,
    again: Sequence[bool],
) -> None:
    """The gradient of a span's loss; `again` has which of its steps' graphs a later span has."""
    steps = [kept[k] for k in at.span.steps if k in kept]
    if len(steps) < 2:
        loss.backward(retain_graph=bool(steps) and again[0])
        for one in steps:  # of this step alone; nothing goes on to the one before
            one.x.grad = None
        return
    loss.backward()
    if at.x.grad is not None:  # a term may look away
        go_back(steps, at.x.grad, most, again)


Needed = dict[Term, tuple[Span, ...]]
"""The spans of an epoch's terms; no term without any."""


def _counted(losses: Tensor, counts: Counts | None, rows: slice) -> Tensor:
    return losses if counts is None else losses * counts.each[rows]


@dataclass(frozen=True, kw_only=True)
class Tilt(Parts):
    """One stage-2 epoch: rollouts, rewards, fake-score updates, one generator update.

    The global batch is one rollout in groups of `settings.group_size`. A group may lie on several
    ranks: rewards are gathered, so that advantages see whole groups. The generator's loss is the
    sum of the `terms`, `policy` among them.
    """

    settings: TiltConfig
    rewards: RewardMixture
    scorer: Scorer
    policy: Policy
    terms: tuple[Term, ...]

    @property
    def updaters(self) -> dict[str, Updater]:
        own = {name: made for term in self.terms for name, made in term.updaters.items()}
        return super().updaters | own

    @recorded
    def iteration(self, step: int) -> dict[str, Tensor]:
        """Runs epoch `step` (0, 1, …); metrics are detached 0-d tensors, this rank's share."""
        chosen = self.settings
        cond, prompts = self._prompts(step)
        spans = {term: found for term in self.terms if (found := term.spans(step))}
        trajectory, graphs = self._rollout(step, cond, spans)
        scored, metrics = self._scored_and_fake_scores(step, trajectory, prompts)
        labels = self._labels(step)
        advantages, parts = group_advantages(
            scored.scores,
            self.rewards.advantage_weights,
            chosen.group_size,
            chosen.advantage_clip,
            labels,
        )
        counts = self._counts(scored, labels)
        means = {f"reward/{name}": values.mean() for name, values in scored.scores.items()}
        for item in self.rewards.rankers:  # a half in every group
            del means[f"reward/{item.ranker.name}"]
        metrics |= {name: self.share.whole(value) for name, value in (means | parts).items()}
        figures = Figures(self.share, metrics)
        epoch = Epoch(step, trajectory, prompts, scored, advantages[self.share.rows])
        metrics |= self._generator_update(epoch, spans, counts, graphs, figures)
        return metrics | figures.metrics

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
        kept = standing_out(
            scored.scores, self.rewards.advantage_weights, chosen.group_size, labels
        )
        most = self.share.batch / kept.sum()
        return Counts(kept[self.share.rows] * most, most)

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

    def _rollout(self, step: int, cond: Grouped, spans: Needed) -> tuple[Rollout, Graphs]:
        """K steps of this rank's rows; steps that no term explores share their noise
        within a group. The states are kept that a term or the fake score will look at; with them
        the graphs of the steps that the generator's update goes through, if these are."""
        drawn = partial(
            self.share.noise,
            self.randomness,
            step=step,
            shape=self.latent_shape,
            device=self.roles.generator.backbone.device,
        )
        x, trained = drawn("init"), {k for term in self.terms for k in term.explores(step)}
        groups = [1 if k in trained else self.settings.group_size for k in range(self.steps - 1)]
        noise = [drawn(f"step{k}", group=size) for k, size in enumerate(groups)]
        every = [span for own in spans.values() for span in own]
        kept = self.settings.keep_graph is True
        graphs = Graphs.of(span.steps for span in every) if kept else NO_GRAPHS
        seen = range(1, self.steps + 1) if self.settings.match_steps != "last" else [self.steps]
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
            keep={*seen, *(k for span in every for k in span.states)},
            graphs=graphs,
        )
        return made, graphs

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
        gradient = any(term.takes_gradient for term in self.terms)
        groups = Groups(self.settings.group_size, partial(self._order, step))
        with self.scorer.begin(trajectory.end, prompts, gradient, groups) as scoring:
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

    def _order(self, step: int, group: int, n: int) -> list[int]:
        """The order in which a ranker sees this rank's group of that number."""
        size = self.settings.group_size
        number = (step * self.share.batch + self.share.rows.start) // size + group
        order: list[int] = self.randomness.permutation("rank/order", number, n).tolist()
        return order

    def _fake_score_gradient(
        self, step: int, update: int, trajectory: Rollout, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        draw = step * self.settings.fake_score_updates + update
        return self.fake.accumulate(draw, self._boundary(draw, trajectory, prompts))

    def _boundary(self, draw: int, trajectory: Rollout, prompts: Sequence[Prompt]) -> Boundary:
        """The boundary samples of one fake-score update."""
        end, last = trajectory.end, self.steps
        if self.settings.match_steps == "last":
            return Boundary.of(trajectory, last, prompts)
        if self.roles.fake_score.boundaries:
            one = 1 + int(self.randomness.integers("fake/boundary", draw, 0, last, (1,)))
            return Boundary.of(trajectory, one, prompts)
        which = self.randomness.integers("fake/boundary", draw, 0, last, (self.share.batch,))
        at = self.share.of(which, end.device)
        x_s = end
        for k in range(last - 1):  # one at a time: a stack would hold all of them once more
            here = (at == k).view(-1, *[1] * (end.ndim - 1))
            x_s = torch.where(here, trajectory.states[k + 1], x_s)
        return Boundary(x_s, trajectory.sigmas[1:][at], None, trajectory.cond, prompts)

    def _generator_update(
        self,
        epoch: Epoch,
        spans: Needed,
        counts: Counts | None,
        graphs: Graphs,
        figures: Figures,
    ) -> dict[str, Tensor]:
        """One optimizer step on the sum of the terms: SubGRPO, AC-DMD, reward back-propagation.

        Each span of sampler steps that some term needs is run once with gradient, unless its graphs
        were kept, and a graph freed when no further span has it.
        """
        whole = self.share.batch * self.policy.parts(epoch.step)
        losses = {term: term.begin(epoch) for term in spans}
        needed = sorted({s for own in spans.values() for s in own}, key=lambda s: s.place)
        metrics: dict[str, Tensor] = {}
        for rows in self.share.micro_batches():
            part, kept = epoch.trajectory.rows(rows), graphs.take()
            left = Counter(k for span in needed for k in span.steps)
            for span in needed:
                most = self._most(span, part, whole, counts)
                at = self._attach(span, rows, part, kept, most)
                total = at.x.new_zeros(len(at.x))
                for term in (t for t, own in spans.items() if span in own):
                    values, seen = losses[term](at)
                    self.updater.watch(term.name, values, epoch.prompts[rows])
                    total = total + values
                    figures.add(term, seen)
                left.subtract(span.steps)
                loss = _counted(total, counts, rows).sum() / whole
                _go_back(loss, at, kept, most, [left[k] > 0 for k in span.steps])
        metrics["generator/grad_norm"] = self.share.whole(self.updater.apply(epoch.step))
        if counts is not None:
            metrics["policy/kept"] = self.share.whole(1 / counts.most)
        self.roles.update_ema(self.ema.at(epoch.step + 1), self.guard.refused(epoch.step))
        return metrics

    def _attach(
        self,
        span: Span,
        rows: slice,
        part: Rollout,
        kept: Mapping[int, Kept],
        most: float | Tensor | None,
    ) -> Attached:
        """A span of a micro-batch with its graph; of several kept steps, its end as a leaf."""
        generator, k = self.roles.generator, span.first
        if len(span) == 1:
            if k not in kept:
                return Attached(span, rows, part, *attach(generator, part, k))
            _, mean, std = kept[k]
            return Attached(span, rows, part, pinned(part, k, mean), mean, std)
        if len(span) and k in kept:
            x = part.states[span.stop].detach().requires_grad_()
        else:
            x = attach_from(generator, part, k, most) if len(span) else part.states[k]
        return Attached(span, rows, part, x, x, torch.zeros_like(x))

    def _most(
        self, span: Span, part: Rollout, whole: int, counts: Counts | None
    ) -> float | Tensor | None:
        """The norm that a bounded gradient has in the loss, and may have on its way."""
        if span.bound is None:
            return None
        one = span.bound / whole * equal_norm(part.end)
        return one if counts is None else one * counts.most
