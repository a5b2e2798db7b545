"""What a request to a reward server may hold, and how long and how often anybody may ask."""

from __future__ import annotations

from dataclasses import dataclass

BODY_LIMIT = 64 * 2**20
"""Bytes of a request."""
IMAGE_PIXELS = 4096 * 4096
"""Pixels of one image."""
REQUEST_PIXELS = 64 * 1024 * 1024
"""Pixels of all images of a request: 64 of a megapixel."""
REQUEST_IMAGES = 256


@dataclass(frozen=True)
class Limits:
    """A server's limits; the defaults are what clients count on.

    `header_timeout`: seconds for a request's headers, and the longest pause in its body, which may
    take `body_timeout` in all. `connections` at a time, `per_address` of them from one address.
    `body` in bytes; `image_pixels` and `request_pixels` are of one image and of all together.
    """

    header_timeout: float = 10.0
    body_timeout: float = 60.0
    connections: int = 64
    per_address: int = 16
    body: int = BODY_LIMIT
    image_pixels: int = IMAGE_PIXELS
    request_pixels: int = REQUEST_PIXELS
