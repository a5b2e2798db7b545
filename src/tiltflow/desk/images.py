"""Images for the page: small ones until somebody asks for one in full."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

SIDES = (192, 1280)
"""Longest sides of thumbnails: one image, and a sheet of samples."""
MOST_PIXELS = 64 * 1024 * 1024
"""Of an image that a thumbnail is made from."""


def thumbnail(file: Path, side: int) -> bytes:
    """A file's image as WebP, at most `side` (of `SIDES`) pixels long; never enlarged.

    Raises:
        ValueError: if it is no image, or one of too many pixels.
    """
    if side not in SIDES:
        raise ValueError(f"thumbnails have a side of {SIDES[0]} or {SIDES[1]} pixels")
    try:
        with Image.open(file, formats=("PNG", "WEBP", "JPEG")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{file.name} has too many pixels for a thumbnail")
            image.draft("RGB", (side, side))
            small = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file.name} is no image that can be read") from error
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    packed = io.BytesIO()
    small.save(packed, "WEBP", quality=86, method=3)
    return packed.getvalue()
