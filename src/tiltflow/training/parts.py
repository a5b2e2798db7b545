"""What both stages are made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import PromptSampler
from tiltflow.models.roles import Roles
from tiltflow.training.averaging import Averaging
from tiltflow.training.optim import Guard, Updater
from tiltflow.training.updates import FakeScoreTrainer, Matching, Share


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks and their updates, on one rank's share of the batch.

    `sigmas` is the few-step grid (K + 1,), `latent_shape` a sample's; `updater` is the generator's.
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
    ema: Averaging

    @property
    def updaters(self) -> dict[str, Updater]:
        return {"generator": self.updater, "fake_score": self.fake.updater}

    @property
    def guard(self) -> Guard:
        return self.updater.guard

    @property
    def steps(self) -> int:
        """K, the number of sampler steps and of boundaries."""
        return len(self.sigmas) - 1


Stage = TypeVar("Stage", bound=Parts)
Iteration = Callable[[Stage, int], dict[str, Tensor]]


def recorded(iteration: Iteration[Stage]) -> Iteration[Stage]:
    """A stage's `iteration`, within which its roles' passes are recorded and replayed."""

    @wraps(iteration)
    def run(stage: Stage, step: int) -> dict[str, Tensor]:
        graphs = stage.roles.generator.graphs
        with graphs.iteration() if graphs is not None else nullcontext():
            return iteration(stage, step)

    return run
