"""What networks compute in, and the attention kernel that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def autocast_dtype(setting: str | None, device: torch.device) -> torch.dtype | None:
    """The mixed-precision type of a `model.autocast` value on a device; None is none.

    `auto` is bf16 except on a CPU without bf16 instructions, where it is slower than fp32.
    """
    slow = device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    if setting is None or (setting == "auto" and slow):
        return None
    return torch.bfloat16


def autocast_in_force(kind: str) -> torch.dtype | None:
    """The autocast type in force on a kind of device, if any."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


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
