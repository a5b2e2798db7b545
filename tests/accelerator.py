"""A make-believe accelerator that counts how often it has to tell the host something.

Its tensors say that their device is `meta` and keep their values in main memory. Whatever makes a
real accelerator's host wait is noted: reading a value, copying to main memory, shapes that depend
on values, and copying from memory that is not pinned, or not asked for as non-blocking. A tensor
made there from Python's numbers waits too; here it is a plain one of `meta` that nothing goes with.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from tiltflow.core import transfer

META = torch.device("meta")
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class Remote(Tensor):
    """A tensor of the accelerator; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Remote({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While it is on, `meta` is the make-believe device; `syncs` says where the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.pinned: dict[int, Tensor] = {}

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/tiltflow/" in f.filename]
        calls = " > ".join(f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in frames)
        self.syncs.append(f"{what} in {calls or 'the test'}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = any(isinstance(leaf, Remote) for leaf in tree_leaves((args, kwargs)))
        if func is aten._pin_memory.default:
            copy = args[0].clone()
            self.pinned[id(copy)] = copy
            return copy
        if func is aten.is_pinned.default:
            return id(args[0]) in self.pinned
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            if there and torch.device(kwargs["device"]) != META:
                self.note("copy to the host")
                return func(args[0].inner, **kwargs)
            if not there and torch.device(kwargs["device"]) == META:
                if not (kwargs.get("non_blocking") and id(args[0]) in self.pinned):
                    self.note("blocking copy to the device")
                return Remote(func(args[0], **{**kwargs, "device": torch.device("cpu")}))
        if func is aten.copy_.default and isinstance(args[0], Remote) != isinstance(
            args[1], Remote
        ):
            self.note("blocking copy")
        if there and (func in READS or (func is aten.index.Tensor and _masks(args[1]))):
            self.note(str(func))
        if there or torch.device(kwargs.get("device") or "cpu") == META:
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def _masks(indices: Any) -> bool:
    return any(i is not None and i.dtype == torch.bool for i in indices)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the values; the results are the accelerator's."""
    inner_args, inner_kwargs = tree_map_only(Remote, lambda t: t.inner, (args, dict(kwargs)))
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = tree_map_only(Tensor, Remote, func(*inner_args, **inner_kwargs))
    return return_and_correct_aliasing(func, args, kwargs, result)


def move(module: nn.Module) -> None:
    """A module's parameters and buffers onto the accelerator, each the same Python object."""
    for parameter in module.parameters():
        if not isinstance(parameter.data, Remote):
            there = nn.Parameter(Remote(parameter.detach()), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, there)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, Remote):
                owner._buffers[name] = Remote(buffer)


@contextmanager
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """The mode, on a device of which the libraries believe what they do of a GPU."""
    monkeypatch.setattr(transfer, "ASYNCHRONOUS", ("cuda", META.type))
    plain = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *rest, **more: plain(kind.replace(META.type, "cpu"), *rest, **more),
    )
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda p: None)
    with Accelerator() as mode:
        yield mode
