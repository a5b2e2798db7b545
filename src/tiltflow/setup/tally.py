"""The memory that operations take, counted as they run."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiltflow.models.pipelines.storage import FP8


class Tally(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live: `live` now, `peak` so far.

    (torch.distributed._tools.MemTracker counts the same to the byte, and is private. It would run a
    whole iteration, too, but not one on the meta device, where no loss or reward has a value; and
    the peaks wanted are those of each phase.)
    """

    def __init__(self, *held: nn.Module | Tensor) -> None:
        """Storages of `held` are there already and not counted."""
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        for thing in held:
            for tensor in [thing] if isinstance(thing, Tensor) else tensors_of(thing):
                self._note(tensor.untyped_storage(), counted=False)

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        result = result_of(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                # a weight that returns to its 8 bits takes the place of what it was before
                self._note(leaf.untyped_storage(), counted=leaf.dtype != FP8)
        return result

    def _note(self, storage: torch.UntypedStorage, counted: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        weakref.finalize(storage, self._forget, key)
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


Key = tuple[Hashable, ...]
Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_KNOWN: dict[Key, list[Shape] | None] = {}
"""What an operation of given shapes has made before: the results' sizes, strides and types, or None
where it changed its first argument in place. On the meta device most are found by Python code, at
nearly a millisecond each, and the blocks of a network ask for the same ones again and again."""


def result_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation's result on the meta device: a new one of the shape of the last time, if all
    that it is given has the same shape; else it is run."""
    key = None if _is_view(func) else _key(func, args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    if key in _KNOWN:
        shapes = _KNOWN[key]
        if shapes is None:
            return args[0]
        made = [torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in shapes]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)
    result = func(*args, **kwargs)
    if func._schema.is_mutable:
        if args and result is args[0] and _key(func, args, kwargs) == key:
            _KNOWN[key] = None
    elif _all_new(func, args, kwargs, result):
        results = [result] if isinstance(result, Tensor) else result
        _KNOWN[key] = [(tuple(r.shape), r.stride(), r.dtype) for r in results]
    return result


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation's result may be a part of what it is given, and it changes nothing; or
    it is none that says so."""
    if not isinstance(func, OpOverload):
        return True
    schema = func._schema
    aliases = any(entry.alias_info for entry in (*schema.arguments, *schema.returns))
    return aliases and not schema.is_mutable


def _all_new(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
    """Whether an operation has given plain tensors on the meta device, each with a storage of its
    own and of its size: `_unsafe_view` has not, and does not say so in its schema."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    given = {leaf.untyped_storage()._cdata for leaf in leaves}
    tensors = [result] if isinstance(result, Tensor) else result
    return (
        isinstance(tensors, (list, tuple))
        and len(tensors) == len(func._schema.returns)
        and all(type(t) is Tensor and t.is_meta for t in tensors)
        and all(t.untyped_storage().nbytes() == _extent(t) * t.itemsize for t in tensors)
        and len(given | {t.untyped_storage()._cdata for t in tensors}) == len(given) + len(tensors)
    )


def _extent(tensor: Tensor) -> int:
    """How many elements the storage of a new tensor of these sizes and strides has."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _key(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key | None:
    """All that decides the shape of a result; None if there is a value that is not known by its
    shape, such as a tensor with numbers."""
    try:
        return (func, *map(_sign, args), *((name, _sign(value)) for name, value in kwargs.items()))
    except TypeError:
        return None


def _sign(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, nn.Parameter):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_sign, value))
    hash(value)
    return type(value), value  # 1, 1.0 and True are equal, and make results of other types


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
