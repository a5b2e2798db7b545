"""The LoRA layer that roles train: PEFT's, its sum inside one product (docs/lab/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tiltflow.core.precision import autocast_in_force

STORED = {
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
    torch.float8_e4m3fn: torch.bfloat16,
}
"""What a frozen matrix of 16 bits or fewer computes in, by what it is kept in."""


class Part(NamedTuple):
    """An adapter's A (r, in) and B (out, r) as they are trained, its scaling, and both in the
    type that the layer computes in: `Copies` of them, or they themselves."""

    down: Tensor
    up: Tensor
    scaling: float
    fast_down: Tensor
    fast_up: Tensor


class Copies:
    """An adapter's matrices in other types, made anew when the adapter has changed.

    Between two optimizer steps a matrix is used by many passes and cast once. `refresh` asks
    torch's own counters of changes in place, which optimizer, average and loading all turn.
    `tensors` are the copies.
    """

    def __init__(self) -> None:
        self._masters: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self._seen = -1

    def of(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        """A matrix in `dtype`: itself, or its copy, right after the next `refresh`."""
        if master.dtype == dtype:
            return master
        copy = torch.empty_like(master, dtype=dtype, requires_grad=False)
        self._masters.append(master.detach())
        self.tensors.append(copy)
        self._seen = -1
        return copy

    def refresh(self) -> None:
        seen = sum([master._version for master in self._masters])
        if seen != self._seen:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self._masters)
            self._seen = seen


class FusedLinear(Linear):
    """y = W x + b + Σ scaling · B A x, each adapter's part added by the product that makes it.

    PEFT's forward multiplies by the scaling and adds in passes of their own over a tensor as large
    as the layer's output, forwards and backwards, and it casts the input to the adapter's type and
    back. Parameters, names and files are PEFT's, and so are all cases but the plain one: no
    dropout, bias or variant of LoRA. What is computed is of the input's type throughout: under a
    bf16 base, fp32 adapters take part as bf16, and their gradients are fp32.

    `parts` are the active adapters, prepared by who switches them; None has PEFT's own state looked
    up by name. torch.compile makes a version of a block's code for every name, but one for all
    parts of the same shapes.
    """

    parts: tuple[Part, ...] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self.active_parts() if self.parts is None else self.parts
        if parts is None or self.merged_adapters or args or kwargs:
            return super().forward(x, *args, **kwargs)
        mixed = autocast_in_force(x.device.type)
        x = x if mixed is None else x.to(mixed)
        base = self.base_layer
        if type(base) is nn.Linear and _in_one(x, base.weight, parts):
            return low_rank_linear(x, base.weight, base.bias, parts)
        rows = x.reshape(-1, x.shape[-1])  # a sum into a view would copy the gradient
        y = self.base_layer(rows)
        for down, up, scaling, _, _ in parts:
            inner = linear(rows, down.to(x.dtype))
            y.addmm_(inner, up.to(x.dtype).t(), alpha=scaling)
        return y.view(*x.shape[:-1], -1)

    def active_parts(self, copies: dict[str, Copies] | None = None) -> tuple[Part, ...] | None:
        """What PEFT's state has active; None if it is a case that is left to PEFT.

        `copies` by adapter get to know the matrices that the layer computes with.
        """
        names = [] if self.disable_adapters else self.active_adapters
        active = [name for name in names if name in self.lora_A]
        if not all(self._plain(name) for name in active):
            return None
        return tuple(self._part(name, copies) for name in active)

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

    def _part(self, name: str, copies: dict[str, Copies] | None) -> Part:
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(down, Tensor) and isinstance(up, Tensor)
        base = self.base_layer
        dtype = STORED.get(base.weight.dtype) if type(base) is nn.Linear else None
        if copies is None or dtype is None:
            return Part(down, up, self.scaling[name], down, up)
        made = copies.setdefault(name, Copies())
        return Part(down, up, self.scaling[name], made.of(down, dtype), made.of(up, dtype))

    def _plain(self, name: str) -> bool:
        """Whether the fused sum is what PEFT's layer does with this adapter."""
        special = name in self.lora_variant or self.lora_bias[name]
        return not special and isinstance(self.lora_dropout[name], nn.Identity)


def _in_one(x: Tensor, weight: Tensor, parts: tuple[Part, ...]) -> bool:
    """Whether everything is there in the input's 16-bit type. In fp32 sums keep their order, and
    what torch compiles it fuses itself."""
    if STORED.get(weight.dtype) != x.dtype or torch.compiler.is_compiling():
        return False
    return all(part.fast_down.dtype == x.dtype for part in parts)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]
) -> Tensor:
    """x (..., in) through W and `parts`: (..., out); the gradient goes to the trained matrices.

    Only the input and the narrow products A x are kept for the backward pass, W as it is stored,
    and the input's gradient is added up by the products that make it.
    """
    masters = [matrix for part in parts for matrix in part[:2]]
    if torch.is_grad_enabled() and (x.requires_grad or any(m.requires_grad for m in masters)):
        out: Tensor = _LowRank.apply(x, weight, bias, tuple(parts), *masters)
        return out
    return _forward(x, weight, bias, parts)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The output (..., out), each part's A x (n, r), and the input as rows (n, in)."""
    rows = x.reshape(-1, x.shape[-1])
    y = linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    inner = []
    for part in parts:
        inner.append(rows @ part.fast_down.t())
        y.addmm_(inner[-1], part.fast_up.t(), alpha=part.scaling)
    return y.view(*x.shape[:-1], -1), inner, rows


class _LowRank(torch.autograd.Function):
    """`low_rank_linear`, whose base is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[Part, ...],
        *masters: Tensor,
    ) -> Tensor:
        y, inner, rows = _forward(x, weight, bias, parts)
        used = [matrix for part in parts for matrix in (part.fast_down, part.fast_up)]
        ctx.save_for_backward(rows, weight, *inner, *used)
        ctx.scalings, ctx.shape = [part.scaling for part in parts], x.shape
        ctx.types = [master.dtype for master in masters]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, weight, *rest = ctx.saved_tensors
        count, needed = len(ctx.scalings), ctx.needs_input_grad
        inner, used = rest[:count], rest[count:]
        g = gradient.reshape(-1, gradient.shape[-1])
        to_x = g @ weight.to(g.dtype) if needed[0] else None
        found: list[Tensor | None] = []
        for i, scaling in enumerate(ctx.scalings):
            down, up = used[2 * i], used[2 * i + 1]
            narrow = g @ up if needed[0] or needed[4 + 2 * i] else None
            if narrow is not None:
                narrow = narrow.mul_(scaling)
            if to_x is not None:
                to_x.addmm_(narrow, down)
            to_down = narrow.t() @ rows if needed[4 + 2 * i] and narrow is not None else None
            to_up = (g.t() @ inner[i]).mul_(scaling) if needed[5 + 2 * i] else None
            found += [
                None if made is None else made.to(dtype)
                for made, dtype in zip((to_down, to_up), ctx.types[2 * i :], strict=False)
            ]
        to_x = None if to_x is None else to_x.view(ctx.shape)
        return to_x, None, None, None, *found


def fused(config: LoraConfig) -> LoraConfig:
    """`config`, whose adapters go on fused layers where PEFT would put its own on a linear one."""
    config._register_custom_module({nn.Linear: FusedLinear})
    return config
