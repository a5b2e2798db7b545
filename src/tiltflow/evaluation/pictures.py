"""The report's pictures: systems side by side, and a run's samples as it learns."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiltflow.models.medium import FRAMES_PER_SECOND, frames_in

MAX_SIDE = 256  # pixels; larger images are shrunk, or 24 prompts make a page of 100 MB
MAX_SHEET = 768  # pixels of the longer side of a whole sheet of samples
MAX_TILE = 160  # pixels of an image that was cut out of one

EVERY = 2
"""Of a video's frames every so many are shown: half the bytes, still eight a second."""
TIMES = 2
"""A video plays this often when the page opens, and then stands still."""

Pixels = NDArray[np.uint8]
Inlined = tuple[str, str, int, int]
"""What it is of, a data URI, width and height."""
Row = tuple[str, list[Inlined]]
"""A prompt and its images."""


@dataclass(frozen=True)
class Sheet:
    """A sheet of a run's samples on the fixed prompts and noise, (H, W, 3) uint8, after `step`.

    `prompts` are those of its images, `columns` in a row of the sheet; none where nobody kept them.
    """

    run: str
    step: int
    image: Pixels
    prompts: tuple[str, ...] = ()
    columns: int = 1

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.step:,}"

    def images(self) -> list[Pixels] | None:
        """The sheet's images one by one, None if their prompts do not divide it evenly."""
        rows, columns = -(-len(self.prompts) // self.columns), self.columns
        if not self.prompts or self.image.shape[0] % rows or self.image.shape[1] % columns:
            return None
        lines = np.split(self.image, rows)
        cut = [image for line in lines for image in np.split(line, columns, axis=1)]
        return cut[: len(self.prompts)]


@dataclass(frozen=True)
class Progress:
    """Sheets of the same prompts, image by image: a column each."""

    names: list[str]
    rows: list[Row]


def progress(
    sheets: Sequence[Sheet],
) -> tuple[list[Progress], list[tuple[Sheet, str, int, int]]]:
    """Sheets whose prompts are known side by side, a table for each list of prompts; the others as
    they were drawn."""
    known: dict[tuple[str, ...], list[tuple[Sheet, list[Pixels]]]] = {}
    whole = []
    for sheet in sheets:
        images = sheet.images()
        if images is None:
            whole.append((sheet, *inlined(sheet.image, sheet.run, MAX_SHEET)))
        else:
            known.setdefault(sheet.prompts, []).append((sheet, images))
    tables = [
        Progress(
            [sheet.name for sheet, _ in found],
            grid({sheet.name: images for sheet, images in found}, prompts, MAX_TILE),
        )
        for prompts, found in known.items()
    ]
    return tables, whole


def grid(
    images: Mapping[str, Sequence[Pixels]], prompts: Sequence[str], most: int = MAX_SIDE
) -> list[Row]:
    """A row a prompt, as many as every system has images.

    Raises:
        ValueError: as `inlined`; if there are more images than prompts.
    """
    for name, found in images.items():
        if len(found) > len(prompts):
            raise ValueError(f"{name!r} has {len(found)} images for {len(prompts)} prompts")
    count = min((len(found) for found in images.values()), default=0)
    return [
        (prompts[row], [(name, *inlined(found[row], name, most)) for name, found in images.items()])
        for row in range(count)
    ]


def pixels_of(file: Path, most: int = MAX_SIDE) -> Pixels:
    """An image's (H, W, 3) uint8; of a video every so many frames (F, h, w, 3), shrunk to `most`,
    for there may be gigabytes of them.

    Raises:
        ValueError: if it is no image that can be read.
    """
    try:
        with Image.open(file) as image:
            frames = list(frames_in(image, lambda count: range(0, count, EVERY)))
    except (EOFError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no image that can be read") from error
    if len(frames) == 1:
        return np.asarray(frames[0])
    return np.stack([np.asarray(_shrunk(frame, most)) for frame in frames])


def _shrunk(picture: Image.Image, most: int) -> Image.Image:
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    return picture


def inlined(image: Pixels, system: str, most: int) -> tuple[str, int, int]:
    """A data URI, width and height of an image (H, W, 3) uint8 or a video's frames (F, H, W, 3), of
    `pixels_of`; sides are shrunk to `most`.

    Raises:
        ValueError: if it is none.
    """
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"{system!r}: report images are (H, W, 3) uint8, got {image.shape} {image.dtype}"
        )
    shown = [image] if image.ndim == 3 else image
    first, *others = (_shrunk(Image.fromarray(np.ascontiguousarray(one)), most) for one in shown)
    buffer, kind = io.BytesIO(), "webp" if others else "png"
    if others:
        lasts = round(1000 * EVERY / FRAMES_PER_SECOND)
        first.save(
            buffer, "WEBP", save_all=True, append_images=others, duration=lasts, loop=TIMES,
            quality=80,
        )  # fmt: skip
    else:
        first.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{data}", first.width, first.height
