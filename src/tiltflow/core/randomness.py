"""Counted randomness: every draw is a function of (run seed, stream name, step) (METHOD §8).

Nothing is consumed, so a resumed run, another number of ranks or another micro-batch size sees
the same noise. A draw is of the global batch, in fp32 or int64 on the CPU, and then moved; whoever
needs a part of it takes a slice, or of latents asks for those rows alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Device = str | torch.device

BLOCK = 1 << 15
"""Numbers of a batch's noise that one generator makes: a rank with its rows of a large batch does
not make the others', and a small batch is one draw."""

SAMPLE_INIT = "sample/init"
"""The stream of images' initial noise, its steps the images' numbers."""


def sample_step(k: int) -> str:
    """The stream of the noise of sampler step k, its steps the images' numbers."""
    return f"sample/step{k}"


@dataclass(frozen=True)
class Randomness:
    """The draws of one run.

    Raises:
        ValueError: on a negative seed; each draw on an empty stream name or a negative step.
    """

    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"the seed is {self.seed}, but it must be 0 or more")

    def generator(self, stream: str, step: int) -> torch.Generator:
        """A fresh CPU generator, seeded with 63 bits of blake2b("seed/stream/step").

        torch's CPU engine starts from the low 32 of them: among 10⁵ draws of a run about one
        pair begins alike, in unrelated places.
        """
        if not stream:
            raise ValueError("a random stream needs a name")
        if step < 0:
            raise ValueError(f"random stream {stream!r}: step {step} is negative")
        digest = hashlib.blake2b(f"{self.seed}/{stream}/{step}".encode(), digest_size=8).digest()
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        return generator

    def normal(
        self, stream: str, step: int, shape: Sequence[int], device: Device = "cpu"
    ) -> Tensor:
        """Standard normal draws of `shape`, fp32."""
        draw = torch.randn(
            tuple(shape), generator=self.generator(stream, step), dtype=torch.float32
        )
        return draw.to(device)

    def normal_rows(self, stream: str, step: int, shape: Sequence[int], rows: slice) -> Tensor:
        """Some rows of standard normal draws of `shape` (B, ...), fp32 on the CPU.

        Blocks of `BLOCK` numbers (one row at least) have a generator each, so that the cost is
        that of the rows asked for. The first block is `normal`'s.
        """
        whole, *one = shape
        each = max(1, BLOCK // max(1, math.prod(one)))
        start, stop, _ = rows.indices(whole)
        blocks = range(start // each, -(-stop // each))
        parts = [
            self.normal(
                f"{stream}#{block}" if block else stream,
                step,
                (min(each, whole - block * each), *one),
            )
            for block in blocks
        ]
        if not parts:
            return torch.empty(0, *one)
        first = blocks.start * each
        return torch.cat(parts)[start - first : stop - first]

    def uniform(
        self,
        stream: str,
        step: int,
        shape: Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        device: Device = "cpu",
    ) -> Tensor:
        """Uniform draws of `shape` between `low` and `high`, fp32 (`high` only by rounding)."""
        if not low <= high:
            raise ValueError(f"random stream {stream!r}: low {low} is above high {high}")
        draw = torch.rand(tuple(shape), generator=self.generator(stream, step), dtype=torch.float32)
        return (low + (high - low) * draw).to(device)

    def integers(
        self,
        stream: str,
        step: int,
        low: int,
        high: int,
        shape: Sequence[int],
        device: Device = "cpu",
    ) -> Tensor:
        """Integers of `shape`, uniform over {low, …, high − 1}, int64."""
        if low >= high:
            raise ValueError(f"random stream {stream!r}: no integer in [{low}, {high})")
        draw = torch.randint(low, high, tuple(shape), generator=self.generator(stream, step))
        return draw.to(device)

    def permutation(self, stream: str, step: int, n: int) -> Tensor:
        """A random order of 0 … n − 1: (n,) int64 on the CPU."""
        return torch.randperm(n, generator=self.generator(stream, step))
