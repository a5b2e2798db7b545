"""The memory that operations take, counted as they run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
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
        result = func(*args, **(kwargs or {}))
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


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
