"""Ranks: the one file that imports torch.distributed.

The base is replicated (or sharded by FSDP2), every rank works on its rows of the global batch, and
gradients are added up by one flat all-reduce: no wrapper around the network, because a wrapper
that waits for every parameter's gradient does not go with switched adapters. A process of its own
is the one rank whose sums are the values themselves.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiltflow.core.errors import PeerLost
from tiltflow.core.heartbeat import JOIN, Heartbeat

RANK_TIMEOUT = 100.0
"""Seconds of silence after which a rank is given up: named within two minutes, all told."""
TIMEOUT = timedelta(hours=24)
"""How long a collective waits. It is no watchdog: one rank may wait for a reward server, encode a
large set of prompts or save, and the heartbeat tells that from a rank that is gone."""
LINGER = 10.0
"""Seconds that a rank waits after it lost another, so that torchrun sees the real failure first."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the `size` ranks of a job.

    Raises (all that communicate):
        PeerLost: if another rank is gone.
    """

    rank: int = 0
    size: int = 1
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """Whether this rank logs and saves."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's rows of n: in rank order, all of them together n, at most one apart."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def gather(self, part: Tensor, n: int) -> Tensor:
        """All n rows from every rank's `share(n)` of them: (b, ...) to (n, ...)."""
        if self.size == 1:
            return part
        whole = part.new_zeros(n, *part.shape[1:])
        whole[self.share(n)] = part
        self._all_reduce(whole)
        return whole

    def spread(self, n: int) -> list[int]:
        """Indices below n, as many on every rank (the last one repeated), for `collect`.

        Equal numbers, because ranks that share a sharded network must call it equally often.
        """
        each = -(-n // self.size)
        return [min(i, n - 1) for i in range(each * self.rank, each * (self.rank + 1))]

    def collect(self, part: Tensor, n: int) -> Tensor:
        """The n rows of which every rank made its `spread(n)`."""
        return self.gather(part, len(part) * self.size)[:n]

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors of one dtype and device over the ranks, in place, in one all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._all_reduce(flat)
        _unpack(flat, tensors)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums of plain numbers over the ranks; the accelerator is not involved."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        self._all_reduce(sums)
        return list(sums.tolist())

    def each(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's plain numbers, of which all have as many, in rank order."""
        n = len(values)
        mine = [0.0] * (n * self.size)
        mine[n * self.rank : n * (self.rank + 1)] = values
        whole = self.total(mine)
        return [whole[n * rank : n * (rank + 1)] for rank in range(self.size)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total([float(flag)])[0] > 0

    def from_main(self, value: int) -> int:
        """Rank 0's value."""
        return int(self.total([float(value) if self.main else 0.0])[0])

    def least(self, value: float) -> float:
        """The smallest of the ranks' values."""
        return min(self.total([value if rank == self.rank else 0.0 for rank in range(self.size)]))

    @torch.no_grad()
    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Gives every rank the values of rank 0's tensors (on one device), in place: one
        broadcast a dtype."""
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in alike])
            with self._peers("broadcast"):
                dist.broadcast(flat, src=0)
            _unpack(flat, alike)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The body on rank 0, and after that on the others: for files that rank 0 puts in order."""
        if not self.main:
            self.total([0.0])
        yield
        if self.main:
            self.total([0.0])

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._peers("all-reduce"):
            dist.all_reduce(tensor)

    @contextmanager
    def _peers(self, what: str) -> Iterator[None]:
        if self.heartbeat is not None:
            self.heartbeat.collectives += 1
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerLost(
                f"rank {self.rank} of {self.size} lost another rank (in {what}); "
                "the failed rank's own message, or torchrun's below, says which and why"
            ) from error


ALONE = Ranks()
"""The one rank of a process of its own."""


def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def ranks_of_job(device: torch.device, rank_timeout: float = RANK_TIMEOUT) -> Iterator[Ranks]:
    """The ranks that torchrun's environment describes, joined into one group; one without it.

    With an accelerator, the process's default device becomes its own one of them. When a rank has
    been silent for `rank_timeout` seconds, one of the others names it, and all of them end.

    Raises:
        ValueError: if `device` names one device for several ranks, or there are too few.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    _claim(device, size)
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN)))
    heartbeat = _heartbeat(store, rank, size, rank_timeout)
    reason = ""
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield Ranks(rank, size, heartbeat)
    except PeerLost as error:
        _mourn(error, heartbeat)
        raise
    except BaseException as error:
        reason = f"ended with {type(error).__name__}"
        raise
    finally:
        heartbeat.close(reason)
        if dist.is_initialized():
            dist.destroy_process_group()


def _heartbeat(store: dist.Store, rank: int, size: int, limit: float) -> Heartbeat:
    """The heartbeat of this rank, over a connection of its own to the job's store."""
    host = os.environ["MASTER_ADDR"]
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    holder = f"{'torchrun' if torchruns else 'rank 0'} on host {host}"
    own = dist.PrefixStore("tiltflow", store.clone())  # type: ignore[attr-defined]

    def lost(sentence: str, speaks: bool) -> None:
        """Ends this process at once, from the heartbeat's thread.

        The main thread is in a collective that no longer has an end. Gloo's cannot be interrupted;
        NCCL's communicators could be aborted, but that returns only when every kernel has, and a
        main thread that waits for the device in another call is not woken. Leaving by `os._exit`
        needs neither, and loses nothing: a checkpoint appears by a rename, whole or not at all.
        """
        try:
            if speaks:
                print(f"tiltflow: {sentence}; the job ends", file=sys.stderr, flush=True)
            _tell_torchrun(PeerLost(sentence))
            time.sleep(3 * heartbeat.interval)  # until the others have noticed by themselves
        finally:
            os._exit(1)

    heartbeat = Heartbeat(own, rank, size, limit, lost, holder, None if torchruns else 0)
    return heartbeat


def _tell_torchrun(error: PeerLost) -> None:
    """Puts the sentence into torchrun's summary, which otherwise names who ended first: this rank,
    not the silent one. (Where there is no torchrun, there is no file to write to.)"""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error
    except PeerLost as raised:
        get_error_handler().record_exception(raised)


def _mourn(error: PeerLost, heartbeat: Heartbeat) -> None:
    """Says at once that a rank is lost (torchrun may end this process within a second), then which,
    and gives torchrun time to see the real failure first."""
    if heartbeat.given_up:  # the heartbeat's thread has named it and is about to end this process
        time.sleep(LINGER)
    print(f"tiltflow: {error}", file=sys.stderr, flush=True)
    began = time.monotonic()
    if found := heartbeat.explain(LINGER):
        print(f"tiltflow: {found}", file=sys.stderr, flush=True)
    time.sleep(max(0.0, LINGER - (time.monotonic() - began)))


def _claim(device: torch.device, size: int) -> None:
    """Makes the accelerator of this process's local rank the default one."""
    if device.type == "cpu":
        return
    if device.index is not None:
        raise ValueError(f"run.device={device} is one device for {size} ranks: leave out the index")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if local >= found:
        raise ValueError(
            f"local rank {local} has no {device.type} device, there are {found}: "
            f"give torchrun --nproc-per-node {found}"
        )
    torch.accelerator.set_device_index(local)


def shared(network: nn.Module) -> bool:
    """Whether the ranks share a network (`shard`), so that all of them must call it equally often:
    each call waits for the others'."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def shard(network: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """FSDP2 over the frozen weights of a network: each of its blocks, then the rest.

    Trainable weights and other adapters stay whole on every rank, where `Ranks.sum_` adds up
    their gradients, so that nothing else knows of the sharding. What is frozen needs no
    reduction, only the all-gather of one block at a time.

    The network lies in main memory, and rank 0 alone need have the values of what is frozen: they
    go to the others block by block, so that no device ever holds more than one block whole.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for name, p in network.named_parameters() if p.requires_grad or ".lora_" in name}
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in [*(block for blocks in lists for block in blocks), network]:
        unsharded = [p for p in module.parameters() if not isinstance(p, DTensor)]
        frozen = [p for p in unsharded if p not in whole]
        for parameter in frozen:
            old = parameter.data
            parameter.data = old.to(device) if ranks.main else torch.empty_like(old, device=device)
        ranks.copy_from_main(frozen)
        fully_shard(module, mesh=mesh, ignored_params=whole)
    ranks.copy_from_main(list(network.buffers()))  # fully_shard has moved them to the device
