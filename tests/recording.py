"""What a CUDA graph does, on a CPU: operations are noted once and done again on the same tensors.

An operation that makes new storage writes into that storage again; one that makes a view or works
in place is done again. So a replay computes with what lies in the tensors by then, and whatever the
work took from anywhere else stays what it was when it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Notes what is done; a value that the host reads is an error, as in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} makes the host wait, which a graph cannot"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        made = [t for t in tensors(result) if t.untyped_storage()._cdata not in given]
        self.done.append((func, args, kwargs, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.done:
            again = tensors(func(*args, **kwargs))
            if made:
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)


class Recording:
    """The engine of `graphs.Graphs` on a CPU; `replays` counts."""

    def __init__(self) -> None:
        self.replays = 0

    def warm(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        recorder = Recorder()
        with recorder:
            made = work()

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return made, replay
