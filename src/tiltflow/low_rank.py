"""The LoRA layer that roles train: PEFT's, with its sum inside one product (docs/benchmarks.md)."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


class FusedLinear(Linear):
    """y = W x + b + Σ scaling · B A x, each adapter's part added by the product that makes it.

    PEFT's forward multiplies by the scaling and adds in passes of their own over a tensor as large
    as the layer's output, forwards and backwards, and under autocast it casts the input to the
    adapter's type and back. Parameters, names and files are PEFT's, and so are all cases but the
    plain one: no dropout, bias or variant of LoRA, and one type throughout.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        mixed = _autocast(x.device.type)
        if self.disable_adapters or args or kwargs or not self._plain(active, x.dtype, mixed):
            return super().forward(x, *args, **kwargs)
        x = x if mixed is None else x.to(mixed)
        y = self.base_layer(x)
        rows = y.view(-1, y.shape[-1])
        for name in active:
            down, up = self._matrices(name)
            inner = linear(x, down.to(x.dtype)).view(-1, len(down))
            rows.addmm_(inner, up.to(x.dtype).t(), alpha=self.scaling[name])
        return y

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of an adapter."""
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(down, Tensor) and isinstance(up, Tensor)
        return down, up

    def _plain(self, names: list[str], dtype: torch.dtype, mixed: torch.dtype | None) -> bool:
        """Whether the fused sum is that of PEFT's layer for inputs of `dtype`."""
        for name in names:
            special = name in self.lora_variant or self.lora_bias[name]
            if special or not isinstance(self.lora_dropout[name], nn.Identity):
                return False
            if mixed is None and self._matrices(name)[0].dtype != dtype:
                return False
        return not self.merged


def _autocast(kind: str) -> torch.dtype | None:
    """The autocast type in force on a kind of device, if any."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def fused(config: LoraConfig) -> LoraConfig:
    """`config`, whose adapters go on fused layers where PEFT would put its own on a linear one."""
    config._register_custom_module({nn.Linear: FusedLinear})
    return config
