"""What the fake score is trained on: ambient velocity matching plus consistency (METHOD §4)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltflow.flow import fake_score_loss, renoise
from tiltflow.method.consistency import consistency_loss
from tiltflow.method.distribution_matching import Field


@dataclass(frozen=True)
class FakeScoreDraws:
    """One batch's randomness. Levels are (B,), noises have the latent's shape."""

    t: Tensor
    noise: Tensor
    delta: Tensor
    transition_noise: tuple[Tensor, Tensor]

    def rows(self, rows: slice) -> FakeScoreDraws:
        a, b = self.transition_noise
        return FakeScoreDraws(self.t[rows], self.noise[rows], self.delta[rows], (a[rows], b[rows]))


def fake_score_objective(
    fake_score: Field,
    x_s: Tensor,
    s: Tensor,
    draws: FakeScoreDraws,
    weight: float,
    eta: float,
    form: str = "two_sample",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ambient loss + `weight` (γ) × consistency: (B,), and both parts for the log.

    `x_s` (B, ...) are boundary samples at levels `s` (B,), without gradient. `fake_score` must
    accept batches of 1 and 2 times B (the two transitions go through it at once).
    """
    x_s = x_s.detach()
    x_t = renoise(x_s, s, draws.t, draws.noise)
    v_t = fake_score(x_t, draws.t)
    matching = fake_score_loss(v_t, x_s, s, draws.t, draws.noise)
    parts = {"fake_score/ambient": matching.detach()}
    if weight == 0:
        return matching, parts
    t_next = (draws.t - draws.delta).clamp(min=0)
    gap = consistency_loss(fake_score, x_t, draws.t, v_t, t_next, draws.transition_noise, eta, form)
    parts["fake_score/consistency"] = gap.detach()
    return matching + weight * gap, parts
