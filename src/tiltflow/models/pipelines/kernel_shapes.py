"""What fused kernels keep for the backward pass, in shapes, for the plan of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.models.pipelines.meta import META


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Attention that keeps what a fused kernel keeps, its operands, its result and its row sums;
    and an RMS norm that keeps its operands and a number a row.

    On the meta device torch would take the plain ones, with a matrix of all pairs of tokens, and
    fp32 steps of the norm. The functions themselves are replaced: a torch function mode is
    suspended inside a backward pass, where checkpointing runs the forward pass again.
    """
    plain, plain_norm = F.scaled_dot_product_attention, F.rms_norm

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Fused.apply(query, key, value)

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:
        return _Norm.apply(x, weight)

    F.scaled_dot_product_attention, F.rms_norm = fused, norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = plain, plain_norm


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], dtype=torch.float32, device=META))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=META)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=META)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
