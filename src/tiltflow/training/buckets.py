"""A stage over several sizes of pictures or numbers of steps: a rollout has one, which is drawn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.models.roles import Roles
from tiltflow.training.cold_start import ColdStart
from tiltflow.training.optim import Guard, Updater
from tiltflow.training.tilt import Tilt

FIGURES = ("generator/matching", "fake_score/ambient")
"""What is logged for each bucket too, with every reward."""


@dataclass(frozen=True)
class Bucketed:
    """One stage a bucket, a size or a number of steps, over the same networks and optimizers.

    The bucket of rollout n (an epoch of stage 2, a cycle of stage 1: `number` of the iteration) is
    drawn by the seed, `stream` and n, in proportion to `weights`, so every rank and a resumed run
    draw the same. An iteration is, draw for draw, that of a run over its bucket alone.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    stages: tuple[ColdStart | Tilt | Bucketed, ...]
    number: Callable[[int], int]
    randomness: Randomness
    stream: str

    @property
    def roles(self) -> Roles:
        return self.stages[0].roles

    @property
    def updaters(self) -> dict[str, Updater]:
        return self.stages[0].updaters

    @property
    def guard(self) -> Guard:
        return self.stages[0].guard

    def drawn(self, step: int) -> int:
        """Which of the buckets iteration `step` has."""
        ends = list(accumulate(self.weights))
        u = float(self.randomness.uniform(self.stream, self.number(step), (1,)))
        return min(bisect_right(ends, u * ends[-1]), len(ends) - 1)

    def iteration(self, step: int) -> dict[str, Tensor]:
        """The stage's, and its main figures once more under the bucket's name."""
        which = self.drawn(step)
        metrics = self.stages[which].iteration(step)
        own = [name for name in metrics if name in FIGURES or name.startswith("reward/")]
        return metrics | {f"{self.names[which]}/{name}": metrics[name] for name in own}
