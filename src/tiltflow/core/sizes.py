"""The size of a picture or a video in pixels: one number of a square, else height and width, in
this order, behind the number of frames if it is a video."""

from __future__ import annotations

import re

Resolution = int | tuple[int, int] | tuple[int, int, int]
"""A square's side, (height, width), or of a video (frames, height, width)."""


def both(resolution: Resolution) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(resolution, int):
        return resolution, resolution
    return resolution[-2], resolution[-1]


def frames_of(resolution: Resolution) -> int:
    """How many frames a sample has; 1 of a picture."""
    return resolution[0] if isinstance(resolution, tuple) and len(resolution) == 3 else 1


def plain(*size: int) -> Resolution:
    """Height and width, behind the frames of a video if there are any, so that equal sizes are
    equal values: one number of a square picture, two of another, three of a video."""
    *frames, height, width = size
    if frames and frames[0] != 1:
        return frames[0], height, width
    return height if height == width else (height, width)


def same_as(resolution: Resolution | list[int]) -> Resolution:
    """The equal size that `plain` writes, of one as a user or a file has it."""
    return resolution if isinstance(resolution, int) else plain(*resolution)


def said(resolution: Resolution) -> str:
    """As a user writes it: 512, or 832x1216, the height first, or 17x480x832 of a video."""
    return "x".join(map(str, resolution)) if isinstance(resolution, tuple) else str(resolution)


def parse_size(text: str) -> Resolution:
    """What `said` writes.

    Raises:
        ValueError: if it is no HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH.
    """
    found = re.fullmatch(r"(?:(\d{1,9})x)?(\d{1,9})x(\d{1,9})", text)
    if found is None:
        raise ValueError(
            f"{text!r} is no size: write HEIGHTxWIDTH in pixels, such as 832x1216, or of a video "
            "FRAMESxHEIGHTxWIDTH"
        )
    return plain(*(int(side) for side in found.groups() if side))
