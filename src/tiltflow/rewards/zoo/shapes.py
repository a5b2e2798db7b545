"""The exact checker of the world of shapes as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiltflow.rewards.base import Metadata
from tiltflow.rewards.worlds.shapes import Caption
from tiltflow.rewards.worlds.shapes_checker import (
    caption_from_metadata,
    caption_from_text,
    read_scene,
    score,
)


class ShapesReward:
    """1 where an image shows what its caption says and nothing else, 0 elsewhere; not
    differentiable. With `soft`, the share in [0, 1] of the caption that holds.

    Raises:
        ValueError: if a prompt is no caption of the world, or its metadata contradict it.
    """

    differentiable = False
    domain = "images"
    at_once = None  # read one by one

    def __init__(self, soft: bool = False) -> None:
        self.soft = soft
        self.name = "shapes_soft" if soft else "shapes"

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        scores = [
            score(read_scene(array), caption_of(text, about))[int(self.soft)]
            for array, text, about in zip(arrays, prompts, metadata, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)


def caption_of(prompt: str, metadata: Mapping[str, object]) -> Caption:
    """The prompt's caption; metadata in GenEval's format, where there are any, must agree.

    Raises:
        ValueError: if it is no caption of the world, or they do not.
    """
    if "include" not in metadata:
        return caption_from_text(prompt)
    caption = caption_from_metadata(metadata)
    if caption.text != prompt:
        raise ValueError(f"the metadata of {prompt!r} are those of {caption.text!r}")
    return caption
