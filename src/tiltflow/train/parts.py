"""What both stages are made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import PromptSampler
from tiltflow.models.roles import Roles
from tiltflow.train.averaging import Averaging
from tiltflow.train.optim import Guard, Updater
from tiltflow.train.updates import FakeScoreTrainer, Matching, Share


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
