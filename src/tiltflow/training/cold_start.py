"""Stage 1: Ambient-Consistent Distribution Matching Distillation (METHOD §4)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltflow.data.prompts import Prompt
from tiltflow.method.boundary import Boundary
from tiltflow.method.distribution_matching import matching_loss
from tiltflow.method.rollout import Rollout, advance, attach, stochastic
from tiltflow.models.backbone import Conditioning, Grouped
from tiltflow.training.objective import Objective
from tiltflow.training.parts import Parts, recorded
from tiltflow.training.settings import ColdStartConfig
from tiltflow.training.updates import rollout_in_parts

Given = tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]
"""A step's two states and levels, the conditioning, and the gradient of the generator's update."""


@dataclass(frozen=True)
class Cycle:
    """Iterations that share one rollout, and with it prompts and noise.

    `number` counts the cycles of a run; `first` is the first iteration and `length` their number.
    """

    number: int
    first: int
    length: int

    @staticmethod
    def of(step: int, reuse: int, generator_every: int) -> Cycle:
        """The cycle of iteration `step`, `reuse` iterations long unless the generator's update,
        the last thing in a cycle that it falls into, cuts it short."""
        window, within = divmod(step, generator_every)
        place = within // reuse
        number = window * -(-generator_every // reuse) + place
        length = min(reuse, generator_every - place * reuse)
        return Cycle(number, window * generator_every + place * reuse, length)


@dataclass(frozen=True, kw_only=True)
class ColdStart(Parts):
    """One stage-1 iteration: a fake-score update, and every `generator_every`-th a generator one.

    Both use the iteration's boundary samples. As published, 1 to K generator steps from noise make
    them, the number drawn uniformly. With `reuse` R > 1, one rollout serves up to R iterations,
    each of which takes another of its boundaries. The generator is the same in all of them, so
    that a run resumed within a cycle makes the same rollout again.

    The generator's update differentiates the step that made its boundary samples. That step is run
    once more for it, or, with `keep_graph`, has its graph kept while the fake score is updated.
    With `fresh_boundary`, as published, that update makes boundary samples of its own from the same
    prompts, with noise and a number of steps drawn anew.
    """

    settings: ColdStartConfig
    objective: Objective
    _held: dict[int, tuple[Rollout, list[Prompt]]] = field(default_factory=dict, repr=False)

    @recorded
    def iteration(self, step: int) -> dict[str, Tensor]:
        """Runs iteration `step` (0, 1, …); metrics are detached 0-d tensors, this rank's share."""
        cycle = Cycle.of(step, self.settings.reuse, self.settings.generator_every)
        stop = self.stops(cycle)[step - cycle.first]
        if cycle.number not in self._held:
            self._held.clear()  # the old one first: both need not be in memory
            self._held[cycle.number] = self._rollout(cycle)
        trajectory, prompts = self._held[cycle.number]
        both = self._updates_both(step)
        kept = self._advance(cycle, trajectory, stop) if both and self.settings.keep_graph else []
        x_s = torch.cat([part.detach() for part in kept]) if kept else trajectory.states[stop]
        at = Boundary(x_s, trajectory.level(stop), stop, trajectory.cond, prompts)
        metrics = self.fake.accumulate(step, at) | self.fake.apply(step)
        if both:
            if self.settings.fresh_boundary:
                trajectory, stop = self._fresh(step, trajectory.cond)
                at = Boundary.of(trajectory, stop, prompts)
            metrics |= self._generator_update(step, trajectory, at, kept)
        each = self.ema.every == "iteration"
        if both or each:
            count = step + 1 if each else (step + 1) // self.settings.generator_every
            self.roles.update_ema(self.ema.at(count), self.guard.refused(step))
        if step + 1 == cycle.first + cycle.length:
            self._held.clear()
        return metrics

    def _updates_both(self, step: int) -> bool:
        return (step + 1) % self.settings.generator_every == 0

    def stops(self, cycle: Cycle) -> list[int]:
        """After how many generator steps each iteration of a cycle takes its boundary."""
        steps, random = self.steps, self.randomness
        if self.settings.reuse == 1:
            return [self._stop("stop", cycle.first)]
        order = random.permutation("stop", cycle.number, steps)[: cycle.length]
        return [k + 1 for k in order.tolist()]

    def _stop(self, stream: str, step: int) -> int:
        """The boundary of iteration `step`: that of its phase, or drawn."""
        if self.settings.boundary_order == "phased":
            return min(1 + step // self.settings.phase, self.steps)
        return int(self.randomness.integers(stream, step, 1, self.steps + 1, (1,)))

    def _rollout(self, cycle: Cycle) -> tuple[Rollout, list[Prompt]]:
        """As many generator steps from noise as the cycle needs, all of this rank's rows, without
        gradient; of the states, the boundaries and what the generator's update starts from."""
        begin = cycle.number * self.share.batch + self.share.rows.start
        indices = self.sampler.indices(begin, len(self.share))
        cond, prompts = self.prompts.select(indices, self.roles.generator.backbone.device)
        *others, end = self.stops(cycle)
        made_later = self.settings.keep_graph and self._updates_both(cycle.first + cycle.length - 1)
        keep = {*others, end - 1} if made_later else {*others, end, end - 1}
        x, stop = self._noise(cycle, "init"), max(keep)
        noise = [self._noise(cycle, f"step{k}") for k in range(min(stop, self.steps - 1))]
        trajectory = rollout_in_parts(
            self.share,
            self.roles.generator,
            x,
            self.sigmas,
            cond,
            self.eta,
            noise,
            stop=stop,
            keep=keep,
        )
        return trajectory, prompts

    def _fresh(self, step: int, cond: Conditioning | Grouped) -> tuple[Rollout, int]:
        """Boundary samples of iteration `step` for the generator's update alone, and after how
        many steps they are."""
        stop, random = self._stop("fresh/stop", step), range(self.steps - 1)
        noise = [self._draw(f"fresh/step{k}", step) for k in random[:stop]]
        trajectory = rollout_in_parts(
            self.share,
            self.roles.generator,
            self._draw("fresh/init", step),
            self.sigmas,
            cond,
            self.eta,
            noise,
            stop=stop,
            keep={stop - 1, stop},
        )
        return trajectory, stop

    def _noise(self, cycle: Cycle, stream: str) -> Tensor:
        """This rank's rows of a draw that the iterations of a cycle share."""
        return self._draw(stream, cycle.number)

    def _draw(self, stream: str, number: int) -> Tensor:
        device = self.roles.generator.backbone.device
        return self.share.noise(self.randomness, stream, number, self.latent_shape, device)

    def _advance(self, cycle: Cycle, trajectory: Rollout, stop: int) -> list[Tensor]:
        """The boundary samples after step `stop`, with their graphs, by micro-batches."""
        k, generator = stop - 1, self.roles.generator
        random = stochastic(self.sigmas, k, self.eta)
        z = self._noise(cycle, f"step{k}") if random else None
        return [
            advance(generator, trajectory.rows(rows), k, None if z is None else z[rows])
            for rows in self.share.micro_batches()
        ]

    def _generator_update(
        self, step: int, trajectory: Rollout, at: Boundary, kept: list[Tensor]
    ) -> dict[str, Tensor]:
        """The objective's gradient at a boundary, carried through the step that made it only;
        `kept` are its graphs by micro-batches, each freed with its backward pass, or nothing."""
        assert at.k is not None
        metrics: dict[str, Tensor] = {}
        gradient = self.objective.gradient("matching", step, at)
        for rows in self.share.micro_batches():
            if kept:
                losses = self._pulled(kept.pop(0), gradient[rows])
            else:
                losses = self._attached(trajectory.rows(rows), at.k - 1, gradient[rows])
            self.updater.watch("the matching loss", losses, at.prompts[rows])
            self.share.add(metrics, {"generator/matching": losses})
        norm = self.share.whole(self.updater.apply(step))
        return metrics | {"generator/grad_norm": norm}

    def _pulled(self, x_s: Tensor, gradient: Tensor) -> Tensor:
        """The matching losses (b,) of samples with a graph, which is gone back through."""
        losses = matching_loss(x_s, gradient)
        (losses.sum() / self.share.batch).backward()
        return losses.detach()

    def _attached(self, part: Rollout, k: int, gradient: Tensor) -> Tensor:
        """The same of step k's samples, which is run again for it."""
        generator, states = self.roles.generator, part.states

        def work(given: Given) -> Tensor:
            x, x_next, sigmas, positive, pull = given
            cond = Conditioning(positive, positive)
            one = Rollout(sigmas, {0: x, 1: x_next}, cond, self.eta)
            return self._pulled(attach(generator, one, 0)[0], pull)

        positive = dict(part.conditioning.positive)
        given = (states[k], states[k + 1], part.sigmas[k : k + 2], positive, gradient)
        return generator.replayed("matching", work, given)
