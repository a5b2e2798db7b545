"""A simulated person who looks at the world of shapes: a taste that captions leave open.

She likes a white background where the caption names none, objects towards the upper left, and large
ones. No builtin reward knows of it, and the exact checker passes images that she likes as well as
images that she does not.
"""

from __future__ import annotations

import numpy as np

from tiltflow.rewards.worlds.shapes import REACH, REACHES, Caption
from tiltflow.rewards.worlds.shapes_checker import Reading, read_scene

GROUND, PLACE, LARGE = 1.0, 2.0, 0.5
"""What a white background is worth; the way across the frame; the way through the sizes."""


def liking(image: np.ndarray, caption: Caption) -> float:
    """How much she likes an image (side, side, 3) uint8 of a caption: about −2 to 3.

    Where she sees no object, place and size say nothing.
    """
    return liking_of(read_scene(image), caption)


def liking_of(reading: Reading, caption: Caption) -> float:
    """`liking` of what was read off an image."""
    liked = 0.0
    if caption.background is None and reading.background == "white":
        liked += GROUND
    if reading.objects:
        x, y = np.mean([(seen.x, seen.y) for seen in reading.objects], axis=0)
        liked += PLACE * float(1 - x - y)
    low, high = REACHES
    reaches = [seen.radius * REACH[seen.shape] for seen in reading.objects if seen.shape]
    if reaches:
        liked += LARGE * float(np.clip((np.mean(reaches) - low) / (high - low), 0, 1))
    return liked


def votes(
    first: np.ndarray, second: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Whether the first of each pair is chosen, (n,) bool, from (n,) likings of both; a share
    `noise` of the votes, drawn one by one, is the other way round."""
    chosen: np.ndarray = (first > second) ^ (rng.random(len(first)) < noise)
    return chosen
