"""The reward of the closed-form Gaussian mixture: its tilted target is a mixture as well."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tiltflow.rewards.base import Metadata


class LinearReward:
    """r(x) = x₁, the first coordinate of points (B, D); differentiable."""

    name = "linear"
    differentiable = True
    domain = "points"
    at_once = None  # nothing is computed

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return images[:, 0]
