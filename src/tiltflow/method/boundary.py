"""Samples at a boundary of the sampler's grid, and what they belong to (METHOD §3, §4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tiltflow.data.prompts import Prompt
from tiltflow.method.rollout import Rollout
from tiltflow.models.backbone import Conditioning, Grouped


@dataclass(frozen=True)
class Boundary:
    """Samples x_s (b, ...) at levels s (b,) in [0, 1), the boundary `k` in 1..K that they have in
    common (None: they are of several), their conditioning and their prompts."""

    x: Tensor
    s: Tensor
    k: int | None
    cond: Conditioning | Grouped
    prompts: Sequence[Prompt]

    @staticmethod
    def of(trajectory: Rollout, k: int, prompts: Sequence[Prompt]) -> Boundary:
        """A trajectory after its step k."""
        return Boundary(trajectory.states[k], trajectory.level(k), k, trajectory.cond, prompts)

    @property
    def conditioning(self) -> Conditioning:
        """`cond`, as networks take it: of the rows of a micro-batch."""
        assert isinstance(self.cond, Conditioning)
        return self.cond

    def rows(self, rows: slice) -> Boundary:
        """Some of the samples."""
        return Boundary(self.x[rows], self.s[rows], self.k, self.cond[rows], self.prompts[rows])
