"""Which attention kernel a run uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def attention_of(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Plain attention where networks compute in bf16 on a CPU, whose fused kernel is slow there.

    Measured on one core, a forward and backward pass of 128 × 4 heads × 28 tokens: in bf16 23 ms
    against 39 of the fused kernel, in fp32 23 against 16.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
