"""From main memory to a device without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor

ASYNCHRONOUS = ("cuda",)
"""Kinds of device that copy from pinned memory while the host goes on."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; an ordinary `.to` has the host wait for all that was enqueued before.

    The pinned copy is PyTorch's own to keep until the device has read it.
    """
    if device.type not in ASYNCHRONOUS or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
