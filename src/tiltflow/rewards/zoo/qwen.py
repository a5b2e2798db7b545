"""One image and one text a row as inputs of a Qwen-VL model, differentiable in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from tiltflow.core.paths import resolve_path
from tiltflow.rewards.weights import absent
from tiltflow.rewards.zoo.clip_family import Preprocessing, image_processor, require_bicubic

IMAGE_TOKEN = "<|image_pad|>"


@dataclass(frozen=True)
class QwenPreprocessing:
    """A Qwen-VL image processor's steps in torch, for images (B, 3, H, W) in [0, 1].

    Sides become multiples of `patch · merge` with between `least` and `most` pixels in all.
    """

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_pretrained(cls, path: str) -> QwenPreprocessing:
        """Read from the `preprocessor_config.json` at a directory or hub id.

        Raises:
            ValueError: if there is none, or it asks for a resize that is not bicubic.
        """
        processor = image_processor(Qwen2VLImageProcessorPil, path)
        require_bicubic(processor, path)
        return cls(
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
            processor.size["shortest_edge"],
            processor.size["longest_edge"],
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that images are resized to."""
        resized: tuple[int, int] = smart_resize(
            height, width, self.patch * self.merge, self.least, self.most
        )
        return resized

    def tokens(self, height: int, width: int) -> int:
        """How many tokens an image takes in the text."""
        high, wide = self.size(height, width)
        return high * wide // (self.patch * self.merge) ** 2

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B · N, 3 · frames · patch²), and each image's grid (1, rows, columns), (B, 3).

        Patches that are merged into one token follow each other; a still is repeated over the
        frames of a patch.
        """
        size = self.size(*images.shape[-2:])
        pixels = Preprocessing(size, None, self.mean, self.std)(images)
        high, wide = (side // self.patch for side in size)
        cut = pixels.reshape(
            *pixels.shape[:2],
            high // self.merge, self.merge, self.patch, wide // self.merge, self.merge, self.patch,
        )  # fmt: skip
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        patches = cut.expand(*cut.shape[:6], self.frames, self.patch, self.patch)
        grid = torch.tensor([[1, high, wide]], device=images.device).expand(len(images), -1)
        return patches.reshape(len(images) * high * wide, -1), grid


@dataclass(frozen=True)
class Tokens:
    """Texts padded on the right: ids and mask (B, L), and where image tokens stand (1, else 0)."""

    input_ids: Tensor
    attention_mask: Tensor
    types: Tensor

    @property
    def last(self) -> Tensor:
        """The index of each row's last token, (B,)."""
        return self.attention_mask.sum(1) - 1


class QwenText:
    """The tokenizer and chat template at `path`: a user's turn of an image and a text.

    Raises:
        ValueError: if there is no tokenizer, or it has no chat template or image token.
    """

    def __init__(self, path: str, device: str | torch.device) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                resolve_path(path), padding_side="right"
            )
        except (OSError, ValueError) as error:
            raise ValueError(absent("tokenizer", path, error)) from error
        if self.tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer at {path!r} has no chat template")
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token in (None, self.tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer at {path!r} knows no {IMAGE_TOKEN}")
        self.device = device

    def __call__(self, texts: Sequence[str], image_tokens: int) -> Tokens:
        """Tokens of one turn a text, up to where the answer begins.

        Raises:
            ValueError: naming the text, if it holds the image token.
        """
        for text in texts:
            if IMAGE_TOKEN in text:
                raise ValueError(f"{text!r} has {IMAGE_TOKEN} in it, which stands for an image")
        encoded = self.tokenizer(
            [self._turn(text, image_tokens) for text in texts], padding=True, return_tensors="pt"
        ).to(self.device)
        types = (encoded.input_ids == self.image_token).int()
        return Tokens(encoded.input_ids, encoded.attention_mask, types)

    def _turn(self, text: str, image_tokens: int) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return turn.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens)
