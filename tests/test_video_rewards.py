"""Videos as a medium: rewards of images on their frames, and what the watch measures of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltflow.models.medium import IMAGES, VIDEOS, load_medium, spread
from tiltflow.rewards.base import (
    FunctionReward,
    Metadata,
    NonFiniteScore,
    RewardFailed,
    checked,
    medium_of,
)
from tiltflow.rewards.frames import FRAMES, OfFrames, for_medium

VIDEO = torch.rand(3, 9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TEXTS = ["a", "bb", "ccc"]


def length_times_mean(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
    lengths = torch.tensor([float(len(text)) for text in prompts])
    return lengths * images.flatten(1).mean(1)


def reward(**options: Any) -> FunctionReward:
    return FunctionReward(length_times_mean, "mean", differentiable=True, **options)


def score(given: Any, videos: Tensor = VIDEO) -> Tensor:
    return checked(given, videos, TEXTS[: len(videos)], [{}] * len(videos))


@pytest.mark.parametrize(("count", "seen"), [(1, [4]), (3, [0, 4, 8]), (20, list(range(9)))])
def test_a_videos_score_is_the_mean_of_the_frames_that_are_seen(
    count: int, seen: list[int]
) -> None:
    videos = VIDEO.clone().requires_grad_(True)
    scores = score(OfFrames(reward(), count), videos)
    by_hand = torch.tensor([1.0, 2, 3]) * VIDEO[:, seen].mean((1, 2, 3, 4))
    assert torch.allclose(scores, by_hand)
    scores.sum().backward()
    assert videos.grad is not None
    moved = videos.grad.abs().amax((0, 2, 3, 4)) > 0
    assert moved.nonzero().flatten().tolist() == seen
    assert spread(9, FRAMES) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_a_score_does_not_know_the_other_videos() -> None:
    def beside(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return images.flatten(1).mean(1) - images.mean()  # 0 of an image that is alone

    alone = for_medium(FunctionReward(beside, "beside"), VIDEOS)
    assert torch.equal(score(alone), torch.zeros(3))
    both, one = score(for_medium(reward(), VIDEOS)), score(for_medium(reward(), VIDEOS), VIDEO[:1])
    assert torch.equal(both[:1], one)


def not_finite(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    return images.flatten(1).mean(1) * torch.nan


def failing(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    raise KeyError("k")


def refusing(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    raise ValueError("no such colour")


@pytest.mark.parametrize(
    ("function", "kind"),
    [(not_finite, NonFiniteScore), (failing, RewardFailed), (refusing, ValueError)],
)
def test_an_error_is_of_the_kind_and_in_the_words_that_it_has_of_images(
    function: Any, kind: type[ValueError]
) -> None:
    """By its kind a run skips an iteration on all ranks, and a server is asked again."""
    of_images = FunctionReward(function, "own")
    said = []
    for given, samples in ((of_images, VIDEO[:, 0]), (for_medium(of_images, VIDEOS, 1), VIDEO)):
        with pytest.raises(ValueError, match="reward 'own'") as caught:
            score(given, samples)
        assert type(caught.value) is kind
        said.append(str(caught.value).partition(" (row ")[0])  # of images, or of frames
    assert said[0] == said[1]


def test_only_rewards_of_images_are_taken_by_frames() -> None:
    mean = reward()
    assert for_medium(mean, IMAGES) is mean
    taken = for_medium(mean, VIDEOS)
    assert isinstance(taken, OfFrames) and taken.count == FRAMES and medium_of(taken) is VIDEOS
    of_videos = reward(domain="videos")
    assert for_medium(of_videos, VIDEOS) is of_videos
    with pytest.raises(ValueError, match="'mean' has frames=3, .* but it scores images here"):
        for_medium(mean, IMAGES, 3)
    with pytest.raises(ValueError, match="'mean' has frames=3, .* but it scores videos"):
        for_medium(of_videos, VIDEOS, 3)
    with pytest.raises(ValueError, match=r"needs \(B, F, 3, H, W\) float videos, got"):
        checked(of_videos, VIDEO[:, 0], TEXTS, [{}] * 3)


def test_features_and_what_a_remote_reward_says_are_handed_on() -> None:
    class Clip:
        name, differentiable, elsewhere, contents = "clip", False, True, "of these weights"

        def image_features(self, images: Tensor) -> Tensor:
            return torch.nn.functional.normalize(images.flatten(1)[:, :4], dim=-1)

        def __call__(self, images: Tensor, prompts: object, metadata: object) -> Tensor:
            return images.flatten(1).mean(1)

    taken: Any = for_medium(Clip(), VIDEOS, 2)
    assert taken.elsewhere and taken.contents == "of these weights"
    ends = [Clip().image_features(VIDEO[:, at]) for at in (0, 8)]
    wanted = torch.nn.functional.normalize((ends[0] + ends[1]) / 2, dim=-1)
    assert torch.allclose(taken.image_features(VIDEO), wanted)
    assert not hasattr(for_medium(reward(), VIDEOS), "image_features")


def test_the_watch_sees_motion_stop() -> None:
    probes = load_medium("videos").probes
    assert set(probes) == {"high_frequency", "motion"}
    frozen = VIDEO[:, :1].expand_as(VIDEO)
    slower = VIDEO[:, :1] + (VIDEO - VIDEO[:, :1]) / 2
    motion = [probes["motion"](videos, 0.125) for videos in (VIDEO, slower, frozen)]
    quarter = torch.tensor(4.0, dtype=torch.float64).log().expand(3)
    assert torch.allclose(motion[0] - motion[1], quarter, atol=1e-4)
    assert (motion[1] - motion[2] > 3).all()
    single = IMAGES.probes["high_frequency"](VIDEO[:, 0], 0.125)
    assert torch.allclose(probes["high_frequency"](frozen, 0.125), single)


def test_what_is_no_video_is_said() -> None:
    beyond = VIDEO.clone()
    beyond[1] += 1
    fault = VIDEOS.check(beyond)
    assert fault is not None and fault.what == "video outside [0, 1]"
    assert fault.rows.tolist() == [False, True, False]
    sheet = VIDEOS.sheet(VIDEO, 2)
    assert sheet.shape == (32, 2 * 3 * 16, 3)
    frames = VIDEOS.encode(VIDEO)
    assert (sheet[:16, 16:32] == frames[0, 4]).all() and (sheet[16:, :16] == frames[2, 0]).all()
