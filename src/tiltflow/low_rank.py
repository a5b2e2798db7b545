"""The LoRA layer that roles train: PEFT's, with its sum inside one product (docs/benchmarks.md)."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

Part = tuple[Tensor, Tensor, float]
"""An adapter's A (r, in) and B (out, r), and its scaling."""


class FusedLinear(Linear):
    """y = W x + b + Σ scaling · B A x, each adapter's part added by the product that makes it.

    PEFT's forward multiplies by the scaling and adds in passes of their own over a tensor as large
    as the layer's output, forwards and backwards, and under autocast it casts the input to the
    adapter's type and back. Parameters, names and files are PEFT's, and so are all cases but the
    plain one: no dropout, bias or variant of LoRA, and one type throughout.

    `parts` are the active adapters, prepared by who switches them; None has PEFT's own state looked
    up by name. torch.compile makes a version of a block's code for every name, but one for all
    parts of the same shapes.
    """

    parts: tuple[Part, ...] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self.active_parts() if self.parts is None else self.parts
        mixed = _autocast(x.device.type)
        if parts is None or self.merged_adapters or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if mixed is None and any(down.dtype != x.dtype for down, _, _ in parts):
            return super().forward(x, *args, **kwargs)
        x = x if mixed is None else x.to(mixed)
        y = self.base_layer(x)
        rows = y.view(-1, y.shape[-1])
        for down, up, scaling in parts:
            inner = linear(x, down.to(x.dtype)).view(-1, len(down))
            rows.addmm_(inner, up.to(x.dtype).t(), alpha=scaling)
        return y

    def active_parts(self) -> tuple[Part, ...] | None:
        """What PEFT's state has active; None if it is a case that is left to PEFT."""
        names = [] if self.disable_adapters else self.active_adapters
        active = [name for name in names if name in self.lora_A]
        if not all(self._plain(name) for name in active):
            return None
        return tuple(self._part(name) for name in active)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self.parts = None
        super().set_adapter(*args, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        self.parts = None
        super().enable_adapters(enabled)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """To the base's device alone: PEFT would round the fp32 draw of A to the base's type, of
        which 8 bits leave a few dozen values."""
        place: Any = self.get_base_layer().weight.device if device is None else device
        for table in (self.lora_A, self.lora_B):
            weight = table[adapter_name].weight if adapter_name in table else None
            if weight is not None and not weight.is_meta:
                table[adapter_name].to(place)

    def _part(self, name: str) -> Part:
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(down, Tensor) and isinstance(up, Tensor)
        return down, up, self.scaling[name]

    def _plain(self, name: str) -> bool:
        """Whether the fused sum is what PEFT's layer does with this adapter."""
        special = name in self.lora_variant or self.lora_bias[name]
        return not special and isinstance(self.lora_dropout[name], nn.Identity)


def _autocast(kind: str) -> torch.dtype | None:
    """The autocast type in force on a kind of device, if any."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def fused(config: LoraConfig) -> LoraConfig:
    """`config`, whose adapters go on fused layers where PEFT would put its own on a linear one."""
    config._register_custom_module({nn.Linear: FusedLinear})
    return config
