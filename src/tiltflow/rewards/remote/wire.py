"""What a reward server and its client say to each other: JSON with PNG images, never pickle.

    GET  /health  ->  {"rewards": {NAME: {"differentiable": false, "contents": DIGEST}},
                       "made_of": {PACKAGE: VERSION}}
    POST /NAME    {"images": [PNG in base64, …], "prompts": […], "metadata": […]}
                  ->  {"scores": […], "contents": DIGEST}
                  or, not in 200,   {"error": "one sentence"}

A message holds pictures and text only: no path, no address and no code can be asked for.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from torch import Tensor

from tiltflow.core.sentences import printable
from tiltflow.core.settings import plain
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.remote.address import TOKEN_VARIABLE
from tiltflow.rewards.remote.limits import IMAGE_PIXELS, REQUEST_IMAGES, REQUEST_PIXELS

TEXT_LIMIT = 4 * 2**20
"""Bytes of a request that are not pictures: prompts and metadata."""
VALUES_LIMIT = 2**18
"""Values in a request's JSON. Each takes some hundred bytes once it is read, so that a body full
of them would take thirty times its own size."""
ANSWER_LIMIT = 2**20
"""Bytes of an answer: many times what `REQUEST_IMAGES` scores take."""
LARGEST_SCORE = float(torch.finfo(torch.float32).max)


def given_token(variable: str = TOKEN_VARIABLE) -> str | None:
    """The token that the environment `variable` gives, or None.

    Raises:
        ValueError: if it could not stand in a header; it is not repeated.
    """
    token = os.environ.get(variable) or None
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError(f"{variable} must be ASCII characters without blanks")
    return token


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
    known = [dict(about) for about in metadata]
    for prompt, about in zip(prompts, known, strict=True):
        try:
            json.dumps(about, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the metadata of {prompt!r} cannot be sent as JSON ({error}): "
                "a reward server takes text, numbers, lists and objects"
            ) from error
    pictures = [png(image) for image in eight_bits(images)]
    batch = {"images": pictures, "prompts": list(prompts), "metadata": known}
    return json.dumps(batch).encode()


def eight_bits(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [0, 1] as (B, H, W, 3) uint8."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    found: np.ndarray = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return found


def png(pixels: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as a PNG in base64."""
    buffer = io.BytesIO()
    # The fastest level: on images of a network the others save little and take far longer.
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Batch:
    """A request that was read: images as PNG in base64, their one size, prompts and metadata.

    Of the images only the headers have been looked at, so it is no larger than the body was.
    """

    pictures: list[str]
    width: int
    height: int
    prompts: list[str]
    metadata: list[dict[str, Any]]

    def images(self, rows: slice) -> Tensor:
        """Some of the images, (b, 3, H, W) fp32 in [0, 1], decoded one after another.

        Raises:
            ValueError: if one is damaged.
        """
        numbers = range(len(self.pictures))[rows]
        images = torch.empty(len(numbers), 3, self.height, self.width)
        for into, number in zip(images, numbers, strict=True):
            pixels = _pixels(number, self.pictures[number], (self.width, self.height))
            into.numpy()[:] = pixels.transpose(2, 0, 1)
        return images.div_(255)


def read_batch(
    body: bytes | bytearray,
    image_pixels: int = IMAGE_PIXELS,
    request_pixels: int = REQUEST_PIXELS,
) -> Batch:
    """What a request's body holds; no image is decoded.

    Raises:
        ValueError: if it is no request, or goes beyond a limit.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > VALUES_LIMIT:
        raise ValueError(f"no request for scores: more than {VALUES_LIMIT} values in its JSON")
    try:
        batch = _Batch.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        said = printable(f"{place} {plain(first['msg'])}".strip())
        raise ValueError(f"no request for scores: {said}") from None
    count = len(batch.images)
    if not 1 <= count <= REQUEST_IMAGES:
        raise ValueError(f"a request has 1 to {REQUEST_IMAGES} images, got {count}")
    if not count == len(batch.prompts) == len(batch.metadata):
        raise ValueError(
            f"got {count} images, {len(batch.prompts)} prompts and {len(batch.metadata)} metadata"
        )
    if len(body) - sum(map(len, batch.images)) > TEXT_LIMIT:
        raise ValueError(f"a request has at most {TEXT_LIMIT} bytes of prompts and metadata")
    sizes = sorted({_size(i, text, image_pixels) for i, text in enumerate(batch.images)})
    if len(sizes) > 1:
        raise ValueError(f"the images of a request have one size, got {sizes[:2]}")
    width, height = sizes[0]
    if count * width * height > request_pixels:
        raise ValueError(
            f"{count} images of {width}×{height} are more than {request_pixels} pixels a request"
        )
    return Batch(batch.images, width, height, batch.prompts, batch.metadata)


def decode_batch(body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """The images (B, 3, H, W) fp32 in [0, 1], prompts and metadata of a request's body.

    Raises:
        ValueError: as `read_batch`, or if an image is damaged.
    """
    batch = read_batch(body)
    return batch.images(slice(None)), batch.prompts, batch.metadata


HEADER = 44
"""Characters of base64 that hold the 33 bytes of a PNG's signature and header."""
MODES = {(0, 1): "1", (0, 8): "L", (0, 16): "I;16", (2, 8): "RGB", (3, 8): "P", (6, 8): "RGBA"}


def _size(number: int, text: str, most: int) -> tuple[int, int]:
    """Width and height that the header of an image gives, which is all that is decoded of it.

    (Pillow would want the whole image decoded from base64 for this, and reads on to the first pixel
    past texts and colour profiles, which it unpacks.)
    """
    wrong = ValueError(f"image {number} is no PNG in base64")
    try:
        head = base64.b64decode(text[:HEADER], validate=True)
        length, width, height, depth, colour = struct.unpack(">8xI4xIIBB7x", head)
    except (binascii.Error, ValueError, struct.error):
        raise wrong from None
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or length != 13:
        raise wrong
    if not 0 < width * height <= most:
        raise ValueError(f"image {number} is {width}×{height}, more than {most} pixels or none")
    if (colour, depth) != (2, 8):
        mode = MODES.get((colour, depth), f"colour type {colour} of {depth} bits")
        raise ValueError(f"image {number} is {mode}, not RGB with eight bits")
    return width, height


def _pixels(number: int, text: str, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) uint8. A later header must not say otherwise than the first one did."""
    try:
        data = io.BytesIO(base64.b64decode(text, validate=True))
        with Image.open(data, formats=("PNG",)) as image:
            if image.size != size or image.mode != "RGB":
                raise ValueError("another size")
            return np.asarray(image)
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ):
        raise ValueError(f"image {number} is a damaged PNG") from None


def parse(body: bytes) -> Any:
    """JSON of others.

    Raises:
        ValueError: if it is none, is no UTF-8, or is nested too deeply.
    """
    return from_json(body)


class OtherReward(ValueError):
    """An answer of a reward with other contents than that which was asked for."""


def decode_scores(body: bytes, count: int, contents: object = None) -> Tensor:
    """The `count` scores of an answer, (count,) fp32, of the reward with these `contents`.

    Raises:
        ValueError: if the answer is not JSON, or does not hold that many finite numbers.
            OtherReward, which is one, if it is of other contents.
    """
    try:
        answer = parse(body)
    except ValueError:
        raise ValueError(f"answered with what is not JSON: {excerpt(body)}") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f"answered without scores: {excerpt(body)}")
    if len(scores) != count:
        raise ValueError(f"answered with {len(scores)} scores for {count} images")
    for number, score in enumerate(scores):
        if not isinstance(score, int | float) or isinstance(score, bool):
            said = printable(repr(score), 60)
            raise ValueError(f"answered with {said} for a score (image {number})")
        if not -LARGEST_SCORE <= score <= LARGEST_SCORE:  # a NaN is neither
            raise ValueError(f"answered with a score that is not finite (image {number})")
    if answer.get("contents") != contents:
        raise OtherReward(
            "was started again with other code, weights or packages, so its scores are no longer "
            "those of the start: start it as it was, or begin a run anew"
        )
    return torch.tensor(scores, dtype=torch.float32)


def excerpt(body: bytes, length: int = 60) -> str:
    """The beginning of an answer, for an error."""
    text = " ".join(body[: 4 * length].decode("utf-8", "replace").split())
    return repr(text[:length] + ("…" if len(text) > length else ""))
