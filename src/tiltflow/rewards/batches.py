"""Fixed numbers of images at a time, so that a score is a function of its own image alone.

A matrix product rounds by its number of rows: the same image beside one other, or beside three,
has another last bit. A network that always gets the same number of images, the last batch filled
up, has one rounding for each of them, whatever their company and whatever it saw before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**25
"""Parameters below which a network's calls take longer than its arithmetic."""
SMALL_AT_ONCE = 8


def images_at_once(given: object, network: nn.Module) -> int:
    """How many images a reward's network takes at a time: `given`, the option `at_once`, else 8 for
    a network below 2²⁵ parameters and 1 for a larger one, which is bound by arithmetic, so that
    company saves little and every image that fills up costs a whole one.

    Raises:
        ValueError: if `given` is neither None nor a whole number from 1.
    """
    if given is None:
        return SMALL_AT_ONCE if sum(p.numel() for p in network.parameters()) < SMALL else 1
    return checked_at_once(given)


def checked_at_once(given: object) -> int:
    """`given` as the number of rows at a time.

    Raises:
        ValueError: if it is no whole number from 1.
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"at_once is {given!r}; it is a number of images, 1 or more")
    return given


def in_fixed_batches(
    function: Callable[..., Tensor], at_once: int, images: Tensor, *columns: Sequence[Any]
) -> Tensor:
    """`function(images, *columns)`, (B, …), called with exactly `at_once` rows at a time.

    The last call is filled up with its last row, without a gradient. Every call gets a copy of its
    own, contiguous: kernels are chosen by strides and alignment too, and a function may write into
    what it is given. Columns are sequences with an element a row.
    """
    parts: list[Tensor] = []
    # `split` and `cat` are each other's backward: no gradient passes through an addition.
    for piece in images.contiguous().split(at_once):
        start = len(parts) * at_once
        rows = list(range(start, start + len(piece)))
        spare = at_once - len(piece)
        if spare:
            block = torch.cat([piece, *[piece[-1:].detach()] * spare])
        else:
            block = piece.clone(memory_format=torch.contiguous_format)
        chosen = rows + rows[-1:] * spare
        result = function(block, *([column[i] for i in chosen] for column in columns))
        parts.append(result[: len(piece)].clone())  # it may be a buffer of the function's own
    return torch.cat(parts)
