"""The report's pictures: systems side by side, and a run's samples as it learns."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SIDE = 256  # pixels; larger images are shrunk, or 24 prompts make a page of 100 MB
MAX_SHEET = 768  # pixels of the longer side of a whole sheet of samples
MAX_TILE = 160  # pixels of an image that was cut out of one

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
        ValueError: if an image is not (H, W, 3) uint8, or there are more images than prompts.
    """
    for name, found in images.items():
        if len(found) > len(prompts):
            raise ValueError(f"{name!r} has {len(found)} images for {len(prompts)} prompts")
    count = min((len(found) for found in images.values()), default=0)
    return [
        (prompts[row], [(name, *inlined(found[row], name, most)) for name, found in images.items()])
        for row in range(count)
    ]


def inlined(image: Pixels, system: str, most: int) -> tuple[str, int, int]:
    """A data URI, width and height of an image (H, W, 3) uint8, its sides shrunk to `most`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"{system!r}: report images are (H, W, 3) uint8, got {image.shape} {image.dtype}"
        )
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/png;base64,{data}", picture.width, picture.height
