"""A weighted set of rewards, scored without gradients or summed with them (METHOD §5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.rewards.base import Metadata, Reward, at_once_of, checked
from tiltflow.rewards.ranking import WeightedRanker


@dataclass(frozen=True)
class Weighted:
    """A reward with its weight; with `backprop` it is back-propagated where it is differentiable.

    Raises:
        ValueError: if the weight is not finite.
    """

    reward: Reward
    weight: float = 1.0
    backprop: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(
                f"the weight of reward {self.reward.name!r} must be finite, got {self.weight}"
            )


class RewardMixture:
    """Several rewards with weights, and `rankers`, which have no scores and take part in the policy
    gradient alone; at least one of either, and no two of one name (ValueError)."""

    def __init__(self, rewards: Sequence[Weighted], rankers: Sequence[WeightedRanker] = ()) -> None:
        names = [*(item.reward.name for item in rewards), *(r.ranker.name for r in rankers)]
        if not names:
            raise ValueError("a reward mixture needs at least one reward")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"reward {name!r} is given twice")
        self.rewards, self.rankers = tuple(rewards), tuple(rankers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.reward.name for item in self.rewards)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward, by name."""
        return {item.reward.name: item.weight for item in self.rewards}

    @property
    def advantage_weights(self) -> dict[str, float]:
        """The weight of each reward and of each ranker, by name."""
        return self.weights | {item.ranker.name: item.weight for item in self.rankers}

    @property
    def at_once(self) -> dict[str, int | None]:
        """How many images each reward is called with (`base.at_once_of`), by name."""
        return {item.reward.name: at_once_of(item.reward) for item in self.rewards}

    @property
    def contents(self) -> dict[str, str]:
        """What the servers of rewards elsewhere say that these are made of, by "NAME server"."""
        found = {
            item.reward.name: getattr(item.reward, "contents", None) for item in self.elsewhere
        }
        return {f"{name} server": of for name, of in found.items() if isinstance(of, str)}

    @property
    def backpropagated(self) -> tuple[Weighted, ...]:
        """The rewards that `differentiable_total` sums."""
        return tuple(r for r in self.rewards if r.backprop and r.reward.differentiable)

    @property
    def elsewhere(self) -> tuple[Weighted, ...]:
        """The rewards that compute elsewhere, so that this process can work in the meantime."""
        return tuple(r for r in self.rewards if getattr(r.reward, "elsewhere", False))

    @property
    def here(self) -> RewardMixture | None:
        """The others; None if there are none."""
        others = [item for item in self.rewards if item not in self.elsewhere]
        return RewardMixture(others) if others else None

    @property
    def has_differentiable(self) -> bool:
        """Whether any reward is back-propagated."""
        return bool(self.backpropagated)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, Tensor]:
        """Every reward's unweighted scores (B,) fp32, without gradients."""
        with torch.no_grad():
            return {
                item.reward.name: checked(item.reward, images, prompts, metadata)
                for item in self.rewards
            }

    def gradient_total(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """R = Σ w r (B,) over the back-propagated rewards alone; the others are not asked."""
        total, _ = RewardMixture(self.backpropagated).differentiable_total(
            images, prompts, metadata
        )
        return total

    def differentiable_total(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R = Σ w r (B,) over the back-propagated rewards, and every reward's detached scores (B,).

        Raises:
            ValueError: if no reward of the mixture is back-propagated.
        """
        backpropagated = [item.reward.name for item in self.backpropagated]
        if not backpropagated:
            raise ValueError("no reward of the mixture is back-propagated")
        scores = {}
        for item in self.rewards:
            with torch.set_grad_enabled(item.reward.name in backpropagated):
                scores[item.reward.name] = checked(item.reward, images, prompts, metadata)
        weighted = [self.weights[name] * scores[name] for name in backpropagated]
        total = torch.stack(weighted).sum(0)
        return total, {name: value.detach() for name, value in scores.items()}
