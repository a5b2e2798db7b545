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
from torch.autograd.function import once_differentiable


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


def no_gradient(name: str) -> str:
    """What is said of a reward that does not keep its promise."""
    return f"reward {name!r} says that it is differentiable, but its scores carry no gradient"


def with_gradient(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reward's `function(images, *columns)`, (B,), which differentiates as it scores: of each
    call the gradient at its images is kept, (B, …), and not the graph.

    The graph of one image through a ViT-H is half a GiB. That of every image and every reward would
    be there until the loss is known, though the loss has one number to say to each of them. A score
    depends on its own image alone, so a row of the sum's gradient is its score's.

    `scored` raises ValueError if the scores do not depend on the images.
    """

    def scored(images: Tensor, *columns: Sequence[Any]) -> Tensor:
        made: Tensor = _Graded.apply(images, name, lambda leaf: function(leaf, *columns))
        return made

    return scored


class _Graded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, name: str, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        leaf = images.detach().requires_grad_(True)
        with torch.enable_grad():
            scores = function(leaf.clone())  # which it may write into, as into no leaf
            (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        if gradient is None:  # of something else, such as its own weights
            raise ValueError(no_gradient(name))
        ctx.save_for_backward(gradient)
        return scores.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * given.view(-1, *[1] * (gradient.ndim - 1)), None, None
