"""Products with a frozen network's fp32 matrices on a CPU, by oneDNN where torch takes MKL.

torch multiplies fp32 matrices with MKL, which leaves AVX-512 unused on processors that are not
Intel's: one core of an AMD EPYC does 110 GFLOP/s with it and 240 with oneDNN, whose convolutions
and 16-bit products torch takes anyway. Both are IEEE fp32; sums round in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` that `take_onednn` has changed the class of."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        plain = input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
        if (
            not plain
            or weight.requires_grad
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            out: Tensor = _Frozen.apply(input, weight, self.bias)
            return out
        return _product(input, weight, self.bias)


class _Frozen(torch.autograd.Function):
    """x Wᵀ + b, whose gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradient.contiguous(), weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times W (out, in), plus b: (..., out)."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def available() -> bool:
    """Whether torch has oneDNN's product, on a processor where it has AVX-512 to itself."""
    capable = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (
        capable
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def take_onednn(*networks: nn.Module) -> int:
    """Changes the linear layers of frozen fp32 networks on a CPU in place, before adapters go on;
    how many it changed. The base of training and the CLIPs of rewards are such networks."""
    if not available():
        return 0
    every = [module for network in networks for module in network.modules()]
    layers = [m for m in every if type(m) is nn.Linear and _fits(m)]
    for layer in layers:
        layer.__class__ = FrozenLinear
    return len(layers)


def _fits(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu"
