"""What a reward server and its client say to each other: JSON with PNG images, never pickle.

    GET  /health  ->  {"rewards": {NAME: {"differentiable": false}}}
    POST /NAME    {"images": [PNG in base64, …], "prompts": […], "metadata": […]}
                  ->  {"scores": […]}   or, not in 200,   {"error": "one sentence"}

A message holds pictures and text only: no path, no address and no code can be asked for.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from tiltflow.rewards.base import Metadata

BODY_LIMIT = 128 * 2**20
"""Bytes of a request."""
IMAGE_PIXELS = 4096 * 4096
"""Pixels of one image."""
REQUEST_PIXELS = 64 * 1024 * 1024
"""Pixels of all images of a request: 64 of a megapixel, 0.8 GB once decoded to fp32."""
REQUEST_IMAGES = 256
ANSWER_LIMIT = 2**20
"""Bytes of an answer: many times what `REQUEST_IMAGES` scores take."""
TOKEN_VARIABLE = "TILTFLOW_REWARD_TOKEN"
"""The environment variable of the token, for server and client: so that it is in no recipe, no
run directory and no list of processes."""


class _Batch(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]]


def encode_batch(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> bytes:
    """A request's body, of images (B, 3, H, W) in [0, 1], which are rounded to eight bits.

    Raises:
        ValueError: if JSON cannot hold the metadata of a prompt; it is named.
    """
    pixels = (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    known = [dict(about) for about in metadata]
    for prompt, about in zip(prompts, known, strict=True):
        try:
            json.dumps(about, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the metadata of {prompt!r} cannot be sent as JSON ({error}): "
                "a reward server takes text, numbers, lists and objects"
            ) from error
    pictures = [_png(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    batch = {"images": pictures, "prompts": list(prompts), "metadata": known}
    return json.dumps(batch).encode()


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    # The fastest level: on images of a network the others save little and take far longer.
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_batch(body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """The images (B, 3, H, W) fp32 in [0, 1], prompts and metadata of a request's body.

    Raises:
        ValueError: if it is no request, or goes beyond a limit; nothing is decoded before the
            sizes in the PNG headers are known to be within the limits.
    """
    try:
        batch = _Batch.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"no request for scores: {place} {first['msg']}".strip()) from None
    count = len(batch.images)
    if not 1 <= count <= REQUEST_IMAGES:
        raise ValueError(f"a request has 1 to {REQUEST_IMAGES} images, got {count}")
    if not count == len(batch.prompts) == len(batch.metadata):
        raise ValueError(
            f"got {count} images, {len(batch.prompts)} prompts and {len(batch.metadata)} metadata"
        )
    opened = [_open(number, text) for number, text in enumerate(batch.images)]
    sizes = {image.size for image in opened}
    if len(sizes) > 1:
        raise ValueError(f"the images of a request have one size, got {sorted(sizes)}")
    width, height = opened[0].size
    if count * width * height > REQUEST_PIXELS:
        raise ValueError(
            f"{count} images of {width}×{height} are more than {REQUEST_PIXELS} pixels a request"
        )
    arrays = [_pixels(number, image) for number, image in enumerate(opened)]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return images, batch.prompts, batch.metadata


def _open(number: int, text: str) -> Image.Image:
    """The header of an image; its pixels are not decoded yet."""
    try:
        data = base64.b64decode(text, validate=True)
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"image {number} is no PNG in base64") from None
    width, height = image.size
    if width * height > IMAGE_PIXELS:
        raise ValueError(f"image {number} is {width}×{height}, more than {IMAGE_PIXELS} pixels")
    if image.mode != "RGB":
        raise ValueError(f"image {number} is {image.mode}, not RGB with eight bits")
    return image


def _pixels(number: int, image: Image.Image) -> np.ndarray:
    try:
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error):
        raise ValueError(f"image {number} is a damaged PNG") from None


def decode_scores(body: bytes, count: int) -> Tensor:
    """The `count` scores of an answer, (count,) fp32.

    Raises:
        ValueError: if the answer is not JSON, or does not hold that many finite numbers.
    """
    try:
        answer = json.loads(body)
    except ValueError:
        raise ValueError(f"answered with what is not JSON: {excerpt(body)}") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f"answered without scores: {excerpt(body)}")
    if len(scores) != count:
        raise ValueError(f"answered with {len(scores)} scores for {count} images")
    for number, score in enumerate(scores):
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise ValueError(f"answered with {score!r} for a score (image {number})")
        if not math.isfinite(score):
            raise ValueError(f"answered with a score that is not finite (image {number})")
    return torch.tensor(scores, dtype=torch.float32)


def excerpt(body: bytes, length: int = 60) -> str:
    """The beginning of an answer, for an error."""
    text = " ".join(body[: 4 * length].decode("utf-8", "replace").split())
    return repr(text[:length] + ("…" if len(text) > length else ""))
