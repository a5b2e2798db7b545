"""Work of a GPU recorded once and replayed: CUDA graphs, one for each kind of work and shape.

Launching a network's kernels one by one costs the host more than some of them take. A function of
tensors that reads nothing from the device and draws no random number is the same list of kernels
every time: it is run once to warm up, recorded, and from then on one launch. Its inputs are copied
to where it reads them, its results are copies of what it writes, and the gradients it leaves lie in
buffers that stay. So a replay has the bits of the work launched by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

Given = TypeVar("Given")
Made = TypeVar("Made")
"""What work takes and makes: tensors, nested in dictionaries, tuples and lists."""


class Engine(Protocol):
    """What records and replays on a kind of device."""

    def warm(self, work: Callable[[], object]) -> object:
        """Runs the work once, as it will be recorded."""

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """The work's results, which each call of the second returned thing computes again."""


class Cuda:
    """CUDA graphs in one pool of memory: what one has freed by its end, the next one uses."""

    def __init__(self) -> None:
        self._pool: Any = None

    def warm(self, work: Callable[[], object]) -> object:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            made = work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        return made

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        torch.cuda.empty_cache()  # what warming up took, the graph takes for its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            made = work()
        self._pool = graph.pool()
        return made, graph.replay


@dataclass
class _Recorded:
    """One recorded work: where it reads, what it writes, and the gradients it leaves."""

    inputs: list[Tensor]
    results: object
    replay: Callable[[], None]
    trained: list[nn.Parameter]


class Graphs:
    """Recorded work by key, and by the shapes and types of its inputs.

    A key stands for everything that the work does beside reading its inputs: which networks, which
    adapters, which loss. Weights that it uses must stay where they are in memory.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._recorded: dict[Hashable, _Recorded] = {}
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._wanted = self._busy = False

    @property
    def on(self) -> bool:
        """Whether a pass should go through `run`: within an iteration of training, where the same
        shapes come again, and not while the work around it is being recorded."""
        return self._wanted and not self._busy

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """An iteration of training."""
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = False

    def __len__(self) -> int:
        return len(self._recorded)

    def run(
        self,
        key: Hashable,
        work: Callable[[Given], Made],
        inputs: Given,
        trained: Sequence[nn.Parameter] = (),
    ) -> Made:
        """`work(inputs)`; the gradients that it leaves in `trained` are added to what is there."""
        leaves, form = tree_flatten(inputs)
        whole = (key, form, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        found = self._recorded.get(whole)
        if found is None:
            found = self._record(work, leaves, form, trained)
            self._recorded[whole] = found
        with torch.no_grad():
            torch._foreach_copy_(found.inputs, leaves)
        self._provide(found.trained)
        found.replay()
        made: Made = tree_map(torch.clone, found.results)
        return made

    def _record(
        self,
        work: Callable[[Given], object],
        leaves: list[Tensor],
        form: TreeSpec,
        trained: Sequence[nn.Parameter],
    ) -> _Recorded:
        """What a first call needs; gradients are afterwards as they were before it."""
        own = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves]
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        self._busy = True
        try:
            self._engine.warm(lambda: work(tree_unflatten(own, form)))
            used = [parameter for parameter in trained if parameter.grad is not None]
            for parameter in trained:
                parameter.grad = None
            self._provide(used)
            results, replay = self._engine.record(lambda: work(tree_unflatten(own, form)))
        finally:
            self._busy = False
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient
        return _Recorded(own, results, replay, used)

    def _provide(self, parameters: Sequence[nn.Parameter]) -> None:
        """Has gradients lie in the buffers that recorded work adds to, with the values they have
        or else zeros."""
        empty, held, values = [], [], []
        for parameter in parameters:
            if parameter not in self._buffers:
                self._buffers[parameter] = torch.zeros_like(parameter)
            buffer = self._buffers[parameter]
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:
                held.append(buffer)
                values.append(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)
        if held:
            torch._foreach_copy_(held, values)


def graphs_for(device: torch.device, wanted: bool) -> Graphs | None:
    """Recording on this device, if it is wanted and there is such a thing."""
    return Graphs(Cuda()) if wanted and device.type == "cuda" else None
