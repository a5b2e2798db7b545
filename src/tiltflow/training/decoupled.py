"""Decoupled DMD (arXiv 2511.22677) as an objective of stage 1: `cold_start.objective=decoupled`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltflow.method.boundary import Boundary
from tiltflow.method.distribution_matching import Draws, decoupled_gradient
from tiltflow.training.parts import Parts


@dataclass(frozen=True)
class Decoupled:
    """The teacher's guidance apart from the matching, each re-noised on its own.

    The paper's "decoupled-hybrid" schedule: the augmentation between the samples' level and the one
    that the step which made them started from, the matching up to 1. The teacher is asked four
    times a sample, where AC-DMD asks it twice.
    """

    parts: Parts

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        """g at this rank's boundary samples (b, ...), all of one boundary; no graph."""
        assert at.k is not None
        own, top = self.parts.matching, self.parts.sigmas[at.k - 1]
        matching = own.draws(stream, draw, at)
        augmenting = own.draws(f"{stream}/augmentation", draw, at, top)

        def part(part: Boundary, rows: slice) -> Tensor:
            def drawn(draws: Draws) -> Draws:
                t, noise, z = draws
                return t[rows], noise[rows], z[rows]

            cond = part.conditioning
            return decoupled_gradient(
                part.x,
                part.s,
                drawn(matching),
                drawn(augmenting),
                own.teacher.field(cond, 1.0),
                own.teacher.field(cond, own.guidance),
                own.fake_score.at(part.k).field(cond),
                own.eta,
            )

        return own.in_parts(at, part)
