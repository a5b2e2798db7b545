"""CLIPScore: the raw cosine similarity of an image and its prompt, differentiable in the image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tiltflow.core.paths import resolve_path
from tiltflow.models.pipelines.products import take_onednn
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.batches import checked_at_once, in_fixed_batches
from tiltflow.rewards.packaged import check_words
from tiltflow.rewards.weights import load_pretrained

BICUBIC = 3  # PIL's number for it, as processor configurations hold it
CACHED_PROMPTS = 8192
FILTERS = ("bicubic", "bilinear")


def image_processor(kind: Any, path: str) -> Any:
    """The image processor of class `kind` that a directory or hub id's configuration describes.

    Raises:
        ValueError: if there is no preprocessor_config.json.
    """
    try:
        return kind.from_pretrained(resolve_path(path))
    except OSError as error:
        raise ValueError(f"{path!r} has no preprocessor_config.json") from error


def require_bicubic(processor: Any, path: str) -> None:
    """Refuses the image processor at `path` with a ValueError if it resizes in another way."""
    if int(processor.resample) != BICUBIC:
        raise ValueError(f"the image processor at {path!r} does not resize bicubically")


@dataclass(frozen=True)
class Preprocessing:
    """A CLIP image processor's steps in torch, for images (B, 3, H, W) in [0, 1].

    `resize` is the length of the shortest edge, a (height, width), or None; `crop` the
    (height, width) cut from the centre, or None; `mean` and `std` are per channel. With `whole`
    nothing is cut off: `resize` is the length of the longest edge, and black fills the square.
    `filter` is of the resize: the processors' own is bicubic.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    whole: bool = False
    filter: str = "bicubic"

    @classmethod
    def from_pretrained(cls, path: str) -> Preprocessing:
        """Read from the `preprocessor_config.json` at a directory or hub id.

        Raises:
            ValueError: if there is none, or it asks for a resize that is not bicubic.
        """
        processor = image_processor(CLIPImageProcessorPil, path)
        resize: int | tuple[int, int] | None = None
        if processor.do_resize:
            require_bicubic(processor, path)
            size = processor.size
            resize = size["shortest_edge"] or (size["height"], size["width"])
        crop = processor.crop_size if processor.do_center_crop else None
        mean, std = processor.image_mean, processor.image_std
        if not processor.do_normalize:
            mean, std = (0.0,) * 3, (1.0,) * 3
        return cls(
            resize,
            None if crop is None else (crop["height"], crop["width"]),
            tuple(mean),
            tuple(std),
        )

    def geometry(self, images: Tensor) -> Tensor:
        """Resized with one antialiased filter where the size differs, and cropped; or with black
        around it, if it is shown whole."""
        height, width = images.shape[-2:]
        size = self._size(height, width)
        if size != (height, width):
            resized = _bilinear if self.filter == "bilinear" else _bicubic
            images = resized(images, size)
        if self.whole:
            return _squared(images)
        if self.crop is None or self.crop == size:
            return images
        top, left = ((have - want) // 2 for have, want in zip(size, self.crop, strict=True))
        if top < 0 or left < 0:
            raise ValueError(f"images of {size} are smaller than the processor's crop {self.crop}")
        return images[..., top : top + self.crop[0], left : left + self.crop[1]]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that an image of this size is resized to."""
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        short, long = min(height, width), max(height, width)
        if self.whole:
            other = max(1, round(short * (self.resize / long)))
            return (other, self.resize) if height <= width else (self.resize, other)
        other = int(self.resize * long / short)
        return (self.resize, other) if height <= width else (other, self.resize)

    def __call__(self, images: Tensor) -> Tensor:
        """Images after `geometry`, normalised, (B, 3, h, w)."""
        images = self.geometry(images)
        mean, std = (_channels(values, images) for values in (self.mean, self.std))
        return (images - mean) / std


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As PIL resizes. The filter is separable, and overshoots at edges. PIL holds eight bits after
    each of its two passes, which clips the overshoot; so must we, in its order: across first,
    unless the height shrinks by more than twice what the width does (found by experiment with
    Pillow 13)."""
    height, width = images.shape[-2:]
    down_first = height - size[0] > max(0, 2 * (width - size[1]))
    middle = (size[0], width) if down_first else (height, size[1])
    for step in (middle, size):
        images = F.interpolate(images, step, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def _bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As torchvision resizes a tensor that is asked for no filter. Its weights are positive, so
    that nothing leaves [0, 1]."""
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _squared(images: Tensor) -> Tensor:
    """Images in the middle of a black square; of an odd rest the smaller half is before them."""
    height, width = images.shape[-2:]
    down, across = (max(height, width) - side for side in (height, width))
    return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))


def _channels(values: Sequence[float], images: Tensor) -> Tensor:
    """(1, 3, 1, 1) on the images' device, filled there: a copy would have the host wait."""
    return torch.stack([images.new_full((), value) for value in values]).view(1, -1, 1, 1)


class CLIPScore:
    """cos(image, prompt) in [-1, 1] under a frozen fp32 CLIP model; differentiable.

    `path` is a directory, a hub id or `packaged:NAME` that holds a `CLIPModel`, its tokenizer and
    its `preprocessor_config.json`; the last two come from `processor` where that is given, and
    the first from `model`. Prompts longer than the text tower's context (77 tokens for the
    published models) are cut there, as is the convention; a packaged toy refuses those, and words
    that it does not know (`rewards/packaged.py`). Exactly `at_once` images are in the model
    at a time, and one text (`batches.py` says why). `resize` is the filter, one of `FILTERS`:
    bicubic is the processor's, bilinear what the published runs score with (METHOD §9).

    Raises:
        ValueError: if any of the three cannot be loaded, or they do not fit together, or there is
            no such filter.
    """

    differentiable = True
    domain = "images"

    def __init__(
        self,
        path: str,
        device: str | torch.device = "cpu",
        name: str = "clipscore",
        *,
        processor: str | None = None,
        model: CLIPModel | None = None,
        at_once: int = 1,
        resize: str = "bicubic",
    ) -> None:
        if resize not in FILTERS:
            known = " or ".join(FILTERS)
            raise ValueError(f"reward {name!r}: resize is {resize!r}; it is {known}")
        self.name = name
        self.words = processor or path
        words = resolve_path(self.words)
        loaded: Any = model
        try:
            if loaded is None:
                loaded = load_pretrained(CLIPModel, path, "CLIP model", torch.float32)
            self.tokenizer = CLIPTokenizer.from_pretrained(words)
        except OSError as error:
            raise ValueError(f"reward {name!r}: there is no tokenizer at {words!r}") from error
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        self.model = loaded.requires_grad_(False).eval().to(device)
        take_onednn(self.model)
        self.preprocessing = replace(Preprocessing.from_pretrained(words), filter=resize)
        text = self.model.config.text_config
        self.context: int = text.max_position_embeddings
        # Without vocabulary files the tokenizer loads all the same, with two tokens.
        if not 2 < len(self.tokenizer) <= text.vocab_size:
            raise ValueError(
                f"reward {name!r}: the tokenizer at {self.words!r} has "
                f"{len(self.tokenizer)} tokens, "
                f"its model {text.vocab_size}"
            )
        self.at_once = checked_at_once(at_once)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) fp32 of images (B, 3, H, W) in [0, 1]; differentiable."""
        return in_fixed_batches(self._seen, self.at_once, images.to(self.device, torch.float32))

    def _seen(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.preprocessing(images)
            return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) fp32 of prompts; kept, since prompts repeat over a run."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        found = {p: self._cache[p] for p in prompts if p in self._cache}
        if missing:
            found |= dict(zip(missing, self._encode(missing), strict=True))
        for prompt, feature in found.items():
            self._cache[prompt] = feature
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return torch.stack([found[p] for p in prompts])

    def cleaned(self, prompt: str) -> str:
        """The prompt as it is handed to the tokenizer."""
        return prompt

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[Tensor]:
        # Each alone, and padded to the context: which others are missing is a matter of history,
        # and a prompt's bits must not be.
        found = []
        for prompt in prompts:
            check_words(prompt, self.words)
            tokens = self.tokenizer(
                [self.cleaned(prompt)],
                padding="max_length",
                max_length=self.context,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                features = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
                found.append(F.normalize(features.pooler_output, dim=-1)[0])
        return found

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        similarity = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return similarity.to(images.device)
