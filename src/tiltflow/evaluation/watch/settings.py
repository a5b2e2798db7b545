"""When the watch warns."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tiltflow.core.settings import Section

FEWEST_SAMPLES = 8
"""Samples, and prompts where these repeat, below which the tests miss changes that anyone sees:
with 2 to 7 a t test at the default level finds few falls of a whole standard deviation."""


class WatchRules(Section):
    """Thresholds (docs/watch.md); None switches a rule off. `alpha` is the level of each test.

    `held_out_fall` X: a held-out reward has lost more than the share X of its gain since its
    highest mean, while a trained reward rose (or where none has scores). `agreement` R: the trained
    rewards rose, and on the samples where they did no held-out reward did (rank correlation below
    R). `diversity` Y: below Y times the reference's. `high_frequency`, `motion` (of videos) and
    `drift`, factors: that much above the higher, or below the lower, of teacher and reference. The
    reference is the first measurement.
    """

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    held_out_fall: Annotated[float, Field(ge=0)] | None = 0.25
    agreement: Annotated[float, Field(gt=-1, lt=1)] | None = 0.4
    diversity: Annotated[float, Field(gt=0, lt=1)] | None = 0.7
    high_frequency: Annotated[float, Field(gt=1)] | None = 2.0
    motion: Annotated[float, Field(gt=1)] | None = 4.0
    drift: Annotated[float, Field(gt=1)] | None = 1.5
