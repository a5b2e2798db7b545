"""What both stages do: a fake-score update, and the generator's matching gradient (METHOD §4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.backbones.base import Conditioning, Grouped
from tiltflow.flow import renoise_level
from tiltflow.objectives.distribution_matching import matching_gradient
from tiltflow.objectives.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.prompts import Prompt
from tiltflow.randomness import Randomness
from tiltflow.roles import Role
from tiltflow.train.optim import Updater, require_finite


def micro_batches(n: int, size: int) -> list[slice]:
    """Slices of `size` rows (the last may be shorter) that cover n rows."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


@dataclass(frozen=True)
class FakeScoreTrainer:
    """`consistency` is γ; `max_delta` in thousandths; `micro` rows a backward pass."""

    role: Role
    updater: Updater
    randomness: Randomness
    eta: float
    micro: int
    consistency: float
    form: str = "two_sample"
    max_delta: int = 200

    def draws(self, draw: int, s: Tensor, shape: tuple[int, ...]) -> FakeScoreDraws:
        """The global batch's levels and noises; `draw` counts the updates of the run."""
        random, device, n = self.randomness, s.device, shape[0]
        delta = random.integers("fake/delta", draw, 1, self.max_delta + 1, (n,)).to(device)
        return FakeScoreDraws(
            t=renoise_level(s, random.uniform("fake/t", draw, (n,), device=device)),
            noise=random.normal("fake/noise", draw, shape, device=device),
            delta=delta.to(s.dtype) / 1000,
            transition_noise=(
                random.normal("fake/a", draw, shape, device=device),
                random.normal("fake/b", draw, shape, device=device),
            ),
        )

    def update(
        self,
        step: int,
        draw: int,
        x_s: Tensor,
        s: Tensor,
        cond: Conditioning | Grouped,
        prompts: Sequence[Prompt],
    ) -> dict[str, Tensor]:
        """One optimizer step on boundary samples x_s (B, ...) at levels s (B,)."""
        draws = self.draws(draw, s, tuple(x_s.shape))
        metrics: dict[str, Tensor] = {}
        for rows in micro_batches(len(x_s), self.micro):
            losses, parts = fake_score_objective(
                self.role.field(cond[rows]),
                x_s[rows],
                s[rows],
                draws.rows(rows),
                self.consistency,
                self.eta,
                self.form,
            )
            require_finite(step, "the fake-score loss", losses, prompts[rows])
            (losses.sum() / len(x_s)).backward()
            for name, values in parts.items():
                metrics[name] = metrics.get(name, 0) + values.sum() / len(x_s)
        metrics["fake_score/grad_norm"] = self.updater.apply(step)
        return metrics


@dataclass(frozen=True)
class Matching:
    """The generator's AC-DMD gradient at a boundary, for both stages.

    `guidance` is the teacher's; draws are counted by (stream, draw) for the global batch.
    """

    teacher: Role
    fake_score: Role
    randomness: Randomness
    guidance: float
    eta: float
    micro: int

    def gradient(
        self, stream: str, draw: int, x_s: Tensor, s: Tensor, conditioning: Conditioning | Grouped
    ) -> Tensor:
        """g at x_s (B, ...), levels s (B,), in micro-batches; no graph."""
        shape, device = tuple(x_s.shape), x_s.device
        random = self.randomness
        t = renoise_level(s, random.uniform(f"{stream}/t", draw, shape[:1], device=device))
        noise = random.normal(f"{stream}/noise", draw, shape, device=device)
        z = random.normal(f"{stream}/z", draw, shape, device=device)
        parts = []
        for rows in micro_batches(len(x_s), self.micro):
            cond = conditioning[rows]
            parts.append(
                matching_gradient(
                    x_s[rows],
                    s[rows],
                    t[rows],
                    noise[rows],
                    z[rows],
                    self.teacher.field(cond, self.guidance),
                    self.fake_score.field(cond),
                    self.eta,
                )
            )
        return torch.cat(parts)
