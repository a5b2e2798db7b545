"""Whether a reward's scores depend on their image and prompt alone, seen once on its first images.

A reward that draws random numbers (a network whose dropout was left on), or whose scores depend on
the images beside them, trains and evaluates without a word, on noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tiltflow.rewards.base import Metadata, Reward, checked

OF_SPREAD, OF_SCORE, LEAST = 1e-2, 1e-4, 1e-6
"""Differences that count as rounding: shares of the scores' spread and of the largest score, and a
number. What runs on a GPU may differ in the last bits between two calls."""


class Examined:
    """The rewards that have been looked at in this process. Those that compute elsewhere are not:
    their servers look themselves (`reward-server`), and others' are asked no more than need be."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def look(
        self,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        scores: Tensor,
    ) -> None:
        """At a reward's first images (B, ...), of which `scores` (B,) are its scores: the first
        half of them once more, without the others.

        Raises:
            ValueError: if an image has another score then, beyond rounding.
        """
        if not len(images) or getattr(reward, "elsewhere", False) or reward.name in self._names:
            return
        n = -(-len(images) // 2)
        first, again = scores[:n], checked(reward, images[:n].detach(), prompts[:n], metadata[:n])
        most = OF_SPREAD * (scores.max() - scores.min()) + OF_SCORE * scores.abs().max() + LEAST
        beyond = (again - first).abs() > most
        if bool(beyond.any()):
            row = int(beyond.nonzero()[0])
            raise ValueError(
                f"reward {reward.name!r} gave one image of {prompts[row]!r} two scores, "
                f"{first[row].item():.6g} and {again[row].item():.6g}: a score may depend on its "
                "image and prompt alone, not on chance (dropout left on?) nor on the images beside"
            )
        self._names.add(reward.name)
