"""A rollout's rewards, and their gradient with respect to its samples, in one pass (METHOD §5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.objectives.reward_backprop import reward_gradient
from tiltflow.prompts import Prompt
from tiltflow.rewards.base import NonFiniteScore
from tiltflow.rewards.combine import RewardMixture
from tiltflow.train.optim import NonFiniteError
from tiltflow.train.updates import Share, micro_batches


@dataclass(frozen=True)
class Scored:
    """`scores`: every reward of the global batch, name → (B,).

    `losses` (b,) are relu(target − R) of this rank's samples and `gradient` (b, ...) their
    gradient with respect to x̂₀; None where no reward is back-propagated.
    """

    scores: dict[str, Tensor]
    losses: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Scorer:
    """Decodes samples once, for their scores and for the gradient of the differentiable rewards.

    `chunk` samples are in a decoder and in a reward model at a time.
    """

    rewards: RewardMixture
    decode: Callable[[Tensor], Tensor]
    share: Share
    target: float
    chunk: int

    def __call__(self, step: int, x0: Tensor, prompts: Sequence[Prompt], backprop: bool) -> Scored:
        """Scores this rank's samples x0 (b, ...); one gather joins the ranks' scores.

        Raises:
            NonFiniteScore: if a score is not finite; NonFiniteError on the other ranks.
        """
        names, problem = self.rewards.names, None
        mine = x0.new_full((len(x0), len(names)), torch.nan)
        losses = gradient = None

        def keep(rows: slice, scores: dict[str, Tensor]) -> None:
            mine[rows] = torch.stack([scores[name] for name in names], 1).to(mine)

        def total(images: Tensor, rows: slice) -> Tensor:
            found, scores = self.rewards.differentiable_total(images, *_of(prompts[rows]))
            keep(rows, scores)
            return found

        try:
            if backprop:
                losses, gradient = reward_gradient(x0, self.decode, total, self.target, self.chunk)
            else:
                for rows in micro_batches(len(x0), self.chunk):
                    with torch.no_grad():
                        images = self.decode(x0[rows])
                    keep(rows, self.rewards.score(images, *_of(prompts[rows])))
        except NonFiniteScore as error:
            problem = error
        table = self.share.ranks.gather(mine, self.share.batch)
        if not bool(torch.isfinite(table).all()):
            raise problem or NonFiniteError(f"step {step}: a reward on another rank is not finite")
        return Scored(dict(zip(names, table.unbind(1), strict=True)), losses, gradient)


def _of(prompts: Sequence[Prompt]) -> tuple[list[str], list]:
    return [p.text for p in prompts], [p.metadata for p in prompts]
