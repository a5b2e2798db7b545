"""Fixed numbers of images at a time, so that a score is a function of its own image alone.

A matrix product rounds by its number of rows, and with several threads by a row's place among
them: the same image beside one other, or beside three, has another last bit. An image that always
goes alone has one rounding, whatever its company and whatever the network saw before.

Several at a time, always as many, the last call filled up, are faster where a network is small.
Then history and the size of a batch still do not matter; a row's place may (it does on CPUs with
several threads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
