"""What ranks the images of one prompt against each other, and the one gate through which it does.

A `Ranker` is no `Reward`: what it says of an image depends on the others in its group. So it has a
place in the policy gradient of stage 2 alone, where a rank within a group is an advantage at once,
and none in an evaluation, in the watch or in a held-out score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltflow.core.interruption import Stopped
from tiltflow.models.medium import IMAGES
from tiltflow.rewards.base import check_samples


@dataclass(frozen=True)
class Groups:
    """Successive groups of `size` images of one prompt each.

    `order(group, n)` is a permutation of 0 … n − 1 for a group by its place among these: counted
    randomness, in which a ranker shows the group's images.
    """

    size: int
    order: Callable[[int, int], Sequence[int]]


class Ranker(Protocol):
    """Ranks images (B, 3, H, W) in [0, 1] within `groups`: standings (B,) from 0 (the last of its
    group) to 1 (the first), ½ on average in every group. `elsewhere` is as of a `Reward`."""

    name: str
    elsewhere: bool

    def __call__(self, images: Tensor, prompts: Sequence[str], groups: Groups) -> Tensor: ...


@dataclass(frozen=True)
class WeightedRanker:
    """A ranker with its weight among the advantages.

    Raises:
        ValueError: if the weight is not finite.
    """

    ranker: Ranker
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.ranker.name!r} must be finite")


def ranked(ranker: Ranker, images: Tensor, prompts: Sequence[str], groups: Groups) -> Tensor:
    """The ranker's standings (B,) fp32 of images (B, 3, H, W).

    Raises:
        ValueError: naming the ranker, if an image is none, the groups do not fill the batch or are
            of several prompts, the ranker fails, or what it gives are no standings.
        Stopped: if the run is asked to stop while it waits.
    """
    start = f"reward {ranker.name!r}"
    check_samples(ranker.name, IMAGES, images, prompts, [{}] * len(prompts))
    size = groups.size
    parts = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    if size < 2 or len(prompts) % size or any(len(set(part)) > 1 for part in parts):
        raise ValueError(f"{start} ranks groups of two or more images of one prompt each")
    try:
        found = ranker(images.detach().float(), prompts, groups)
    except Stopped:
        raise
    except ValueError as error:
        raise ValueError(f"{start}: {error}") from error
    if found.shape != (len(prompts),) or not _standings(found.view(-1, size)):
        raise ValueError(f"{start} must give ({len(prompts)},) standings, 0.5 on average")
    return found.to(images.device, torch.float32)


def _standings(found: Tensor) -> bool:
    """Whether every group's, (n, G), are from 0 to 1 and ½ on average."""
    inside = bool(((found >= 0) & (found <= 1)).all())
    return inside and torch.allclose(found.mean(1), torch.tensor(0.5))
