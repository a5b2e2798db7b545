"""Sizes of pictures in one run: each with a weight, and the prompts that it goes with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiltflow.core.limits import LONGEST_SIDE
from tiltflow.core.sizes import Resolution, both, frames_of, parse_size, plain, said
from tiltflow.data.prompts import Prompt

MOST_SIZES = 100
"""In one run: each has latents and a grid of noise levels of its own."""


@dataclass(frozen=True)
class Bucket:
    """Pictures of `size`, drawn in proportion to `weight`, of the prompts with these numbers (None:
    of all)."""

    size: Resolution
    weight: float = 1.0
    prompts: tuple[int, ...] | None = None


def by_column(
    column: str,
    prompts: Sequence[Prompt],
    weights: Sequence[float] | None = None,
    where: str = "data.buckets",
) -> list[Bucket]:
    """A bucket for each size in a column of the prompt file, in the order of their first prompts;
    each weighs as much as it has prompts, or as these weigh. One of weight 0 is left out. `where`
    names the column in an error.

    Raises:
        ValueError: naming the first prompt that has no size there.
    """
    found: dict[Resolution, list[int]] = {}
    for number, prompt in enumerate(prompts):
        size = _size(column, number, prompt.metadata, where)
        if not all(1 <= side <= LONGEST_SIDE for side in (*both(size), frames_of(size))):
            raise ValueError(
                f"{where}: prompt {number + 1} has the size {said(size)}; a side goes from 1 to "
                f"{LONGEST_SIDE}, and so do frames"
            )
        found.setdefault(size, []).append(number)
    if len(found) > MOST_SIZES:
        raise ValueError(
            f"{where}: the prompts have {len(found)} different sizes; {MOST_SIZES} is the most"
        )
    heavy = {
        size: len(rows) if weights is None else math.fsum(weights[row] for row in rows)
        for size, rows in found.items()
    }
    return [Bucket(size, heavy[size], tuple(rows)) for size, rows in found.items() if heavy[size]]


def _size(column: str, number: int, metadata: Mapping[str, object], where: str) -> Resolution:
    """A side, [height, width], [frames, height, width], or either with x between, as text; a side
    may be text, as in CSV."""
    match metadata.get(column):
        case int(side) if not isinstance(side, bool):
            return side
        case [int(), int()] | [int(), int(), int()] as sides if {*map(type, sides)} == {int}:
            return plain(*sides)
        case str(text) if re.fullmatch(r"[0-9]{1,9}", text.strip()):
            return int(text)
        case str(text):
            try:
                return parse_size(text)
            except ValueError as error:
                raise ValueError(f"{where}: prompt {number + 1}: {error}") from error
    raise ValueError(
        f"{where}: prompt {number + 1} has no size as {column!r}: a side, [height, width] or "
        "HEIGHTxWIDTH"
    )
