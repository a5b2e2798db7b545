"""What both stages do: a fake-score update, and the generator's matching gradient (METHOD §4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.core.randomness import Randomness
from tiltflow.core.transfer import to_device
from tiltflow.flow import T_MARGIN, renoise_level
from tiltflow.method.boundary import Boundary
from tiltflow.method.distribution_matching import Draws, matching_gradient
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.policy import share_in_groups
from tiltflow.method.rollout import NO_GRAPHS, Graphs, Rollout, join, rollout
from tiltflow.models.backbone import Conditioning, Grouped
from tiltflow.models.roles import Role
from tiltflow.training.optim import Updater

Given = tuple[
    Tensor, Tensor, dict[str, Tensor], tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]
]
"""x, its levels, the conditioning and the draws of a fake-score update."""


def micro_batches(n: int, size: int) -> list[slice]:
    """Slices of `size` rows (the last may be shorter) that cover n rows."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass(frozen=True)
class Share:
    """This rank's part of a global batch, worked on `micro` rows at a time.

    What an iteration returns as metrics is the rank's share of each: over the ranks they add up.
    """

    batch: int
    micro: int
    ranks: Ranks = ALONE

    @property
    def rows(self) -> slice:
        """This rank's rows of the global batch."""
        return self.ranks.share(self.batch)

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def micro_batches(self) -> list[slice]:
        """Slices of this rank's own rows, counted from 0."""
        return micro_batches(len(self), self.micro)

    def of(self, draw: Tensor, device: torch.device) -> Tensor:
        """This rank's rows of a draw that was made for the global batch."""
        return to_device(draw[self.rows], device)

    def noise(
        self,
        random: Randomness,
        stream: str,
        step: int,
        shape: Sequence[int],
        device: torch.device,
        group: int = 1,
    ) -> Tensor:
        """This rank's rows of the global batch's normal draws, each of `shape`.

        The members of a group of `group` rows have the noise of its first, wherever they lie.
        """
        first = self.rows.start - self.rows.start % group
        rows = slice(first, self.rows.stop)
        drawn = random.normal_rows(stream, step, (self.batch, *shape), rows)
        return to_device(
            share_in_groups(drawn, group)[self.rows.start - first : len(drawn)], device
        )

    def add(self, metrics: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Adds per-sample values (b,) of a micro-batch to metrics, which are means of the batch."""
        for name, each in values.items():
            part = each.sum() / self.batch
            metrics[name] = metrics[name] + part if name in metrics else part

    def whole(self, value: Tensor) -> Tensor:
        """A rank's share of a metric that every rank knows in full."""
        return value / self.ranks.size


def rollout_in_parts(
    share: Share,
    role: Role,
    x: Tensor,
    sigmas: Tensor,
    cond: Conditioning | Grouped,
    eta: float,
    noise: Sequence[Tensor],
    *,
    stop: int | None = None,
    record: Collection[int] = (),
    convention: str = "unit",
    keep: Collection[int] | None = None,
    graphs: Graphs = NO_GRAPHS,
) -> Rollout:
    """`rollout` of a rank's rows, x and every step's noise (b, ...), in micro-batches."""

    def part(rows: slice) -> Rollout:
        z = [step[rows] for step in noise]
        return rollout(
            role,
            x[rows],
            sigmas,
            cond[rows],
            eta,
            z.__getitem__,
            stop=stop,
            record=record,
            convention=convention,
            keep=keep,
            graphs=graphs,
        )

    return join([part(rows) for rows in share.micro_batches()], cond)


@dataclass(frozen=True)
class FakeScoreTrainer:
    """`consistency` is γ; `max_delta` in thousandths."""

    role: Role
    updater: Updater
    randomness: Randomness
    share: Share
    eta: float
    consistency: float
    form: str = "two_sample"
    max_delta: int = 200

    def draws(self, draw: int, x_s: Tensor, s: Tensor) -> FakeScoreDraws:
        """Levels and noises of this rank's rows; `draw` counts the updates of the run."""
        random, n = self.randomness, self.share.batch

        def mine(values: Tensor) -> Tensor:
            return self.share.of(values, s.device)

        def noise(which: str) -> Tensor:
            return self.share.noise(random, f"fake/{which}", draw, x_s.shape[1:], s.device)

        delta = mine(random.integers("fake/delta", draw, 1, self.max_delta + 1, (n,)))
        return FakeScoreDraws(
            t=renoise_level(s, mine(random.uniform("fake/t", draw, (n,)))),
            noise=noise("noise"),
            delta=delta.to(s.dtype) / 1000,
            transition_noise=(noise("a"), noise("b")),
        )

    def accumulate(self, draw: int, at: Boundary) -> dict[str, Tensor]:
        """The gradient at this rank's boundary samples, for `apply`; `draw` as in `draws`."""
        draws = self.draws(draw, at.x, at.s)
        metrics: dict[str, Tensor] = {}
        role = self.role.at(at.k)

        def work(given: Given) -> tuple[Tensor, dict[str, Tensor]]:
            x, level, positive, drawn = given
            losses, parts = fake_score_objective(
                role.field(Conditioning(positive, positive)),
                x,
                level,
                FakeScoreDraws(*drawn),
                self.consistency,
                self.eta,
                self.form,
            )
            (losses.sum() / self.share.batch).backward()
            return losses.detach(), parts

        for rows in self.share.micro_batches():
            part = at.rows(rows)
            one = draws.rows(rows)
            drawn = (one.t, one.noise, one.delta, one.transition_noise)
            given = (part.x, part.s, dict(part.conditioning.positive), drawn)
            losses, parts = role.replayed("fake score", work, given)
            self.updater.watch("the fake-score loss", losses, part.prompts)
            self.share.add(metrics, parts)
        return metrics

    def apply(self, step: int) -> dict[str, Tensor]:
        """The optimizer step on what was accumulated."""
        return {"fake_score/grad_norm": self.share.whole(self.updater.apply(step))}


@dataclass(frozen=True)
class Matching:
    """The generator's AC-DMD gradient at a boundary, for both stages.

    `guidance` is the teacher's; draws are counted by (stream, draw) for the global batch. At level
    s the gradient counts (1 − s)^−`boundary_power` times: 0 is as published; with 1, a gap between
    teacher and fake score weighs as much as the gap in the data that it stands for.
    """

    teacher: Role
    fake_score: Role
    randomness: Randomness
    share: Share
    guidance: float
    eta: float
    boundary_power: float = 0.0

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        """g at this rank's boundary samples (b, ...), in micro-batches; no graph."""
        t, noise, z = self.draws(stream, draw, at)

        def part(part: Boundary, rows: slice) -> Tensor:
            return matching_gradient(
                part.x,
                part.s,
                t[rows],
                noise[rows],
                z[rows],
                self.teacher.field(part.conditioning, self.guidance),
                self.fake_score.at(part.k).field(part.conditioning),
                self.eta,
            )

        return self.in_parts(at, part)

    def draws(self, stream: str, draw: int, at: Boundary, top: Tensor | None = None) -> Draws:
        """Levels t, uniform between the samples' own and `top` (0-d; None is 1), and noises of this
        rank's rows."""
        shape, device = at.x.shape[1:], at.x.device
        random, share = self.randomness, self.share
        uniform = share.of(random.uniform(f"{stream}/t", draw, (share.batch,)), device)
        if top is not None:
            low = at.s + T_MARGIN
            uniform = uniform * (top - low).clamp(min=0) / (1 - low)
        noise = share.noise(random, f"{stream}/noise", draw, shape, device)
        z = share.noise(random, f"{stream}/z", draw, shape, device)
        return renoise_level(at.s, uniform), noise, z

    def in_parts(self, at: Boundary, part: Callable[[Boundary, slice], Tensor]) -> Tensor:
        """What `part` gives for the rows of each micro-batch, weighted by the samples' levels."""
        parts = [part(at.rows(rows), rows) for rows in self.share.micro_batches()]
        weight = (1 - at.s).pow(-self.boundary_power)
        return torch.cat(parts) * weight.view(-1, *[1] * (at.x.ndim - 1))
