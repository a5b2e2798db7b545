"""The size of a picture in pixels: one number of a square, else height and width, in this order."""

from __future__ import annotations

import re

Resolution = int | tuple[int, int]
"""A square's side, or (height, width)."""


def both(resolution: Resolution) -> tuple[int, int]:
    """(height, width)."""
    return resolution if isinstance(resolution, tuple) else (resolution, resolution)


def plain(height: int, width: int) -> Resolution:
    """The one number of a square, so that equal sizes are equal values."""
    return height if height == width else (height, width)


def said(resolution: Resolution) -> str:
    """As a user writes it: 512, or 832x1216, the height first."""
    return "x".join(map(str, resolution)) if isinstance(resolution, tuple) else str(resolution)


def parse_size(text: str) -> Resolution:
    """What `said` writes.

    Raises:
        ValueError: if it is no HEIGHTxWIDTH.
    """
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if found is None:
        raise ValueError(f"{text!r} is no size: write HEIGHTxWIDTH in pixels, such as 832x1216")
    return plain(int(found[1]), int(found[2]))
