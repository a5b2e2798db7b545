"""Rewards of images on videos: a video's score is the mean of its frames'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltflow.models.medium import IMAGES, VIDEOS, Medium, spread
from tiltflow.rewards.base import Metadata, Reward, checked, medium_of

FRAMES = 8
"""How many frames of a video are looked at where a config does not say."""


class OfFrames:
    """A reward of images that scores videos (B, F, 3, H, W): the mean over `count` frames, evenly
    from the first to the last, of what `reward` gives to each with the video's prompt and metadata.

    It is differentiable where the reward is; the frames between have no gradient.
    """

    domain = VIDEOS.name
    gated = True
    """Its own call is through `checked`, whose errors have their names and kinds."""

    def __init__(self, reward: Reward, count: int | None = None) -> None:
        self.reward, self.count = reward, count or FRAMES
        self.name, self.differentiable = reward.name, reward.differentiable
        self.elsewhere: bool = getattr(reward, "elsewhere", False)
        if hasattr(reward, "contents"):
            self.contents = reward.contents
        if hasattr(reward, "lasting"):
            self.lasting = reward.lasting
        if hasattr(reward, "image_features"):
            self.image_features = self._features

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        frames = self._frames(images)
        times = len(frames) // len(images)
        texts = [prompt for prompt in prompts for _ in range(times)]
        about = [each for each in metadata for _ in range(times)]
        scores = checked(self.reward, frames, texts, about)
        return scores.unflatten(0, (len(images), times)).mean(1)

    def _frames(self, videos: Tensor) -> Tensor:
        """(B · count, 3, H, W), the frames of a video in succession."""
        return videos[:, spread(videos.shape[1], self.count)].flatten(0, 1)

    def _features(self, videos: Tensor) -> Tensor:
        """(B, F), unit vectors: the direction of the mean of the frames' own."""
        found: Tensor = self.reward.image_features(self._frames(videos))  # type: ignore[attr-defined]
        mean = found.unflatten(0, (len(videos), -1)).mean(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def for_medium(reward: Reward, medium: Medium, count: int | None = None) -> Reward:
    """The reward itself, or of images where videos are generated, its mean over `count` frames.

    Raises:
        ValueError: if `count` is given where there are no videos, or the reward is of videos as
            they are.
    """
    here = medium_of(reward).name
    if medium.name == VIDEOS.name and here == IMAGES.name:
        return OfFrames(reward, count)
    if count is not None:
        what = f"scores {here}" if here != IMAGES.name else f"scores {medium.name} here"
        raise ValueError(
            f"reward {reward.name!r} has frames={count}, which are of a video for a reward of "
            f"images, but it {what}"
        )
    return reward
