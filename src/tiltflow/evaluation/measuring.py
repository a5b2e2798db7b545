"""Sampling the systems of an evaluation batch by batch, and scoring what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.core.distributed import Ranks
from tiltflow.evaluation.chunks import Made, Take
from tiltflow.evaluation.diversity import pairwise_distance, vendi_score
from tiltflow.models.medium import Features, Medium, article
from tiltflow.rewards.base import Reward, checked
from tiltflow.rewards.purity import Examined

DIVERSITY = "diversity"

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
SaveImages = Callable[[str, Sequence[int], NDArray[np.generic]], None]


class PromptLike(Protocol):
    """A prompt's text and what else is known about it."""

    @property
    def text(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class System:
    """Something that makes a sample of a prompt in `nfe` evaluations of a network.

    `sample(indices)` gives the samples (images: (B, 3, H, W) in [0, 1]) of the prompts with these
    indices; the noise depends on the index alone, so systems are compared on the same noise.
    `redraw(indices, draw)`, where there is one, does the same from the noise number `draw` = 0,
    1, …; it is what diversity is measured on.
    """

    name: str
    nfe: int
    sample: Callable[[Sequence[int]], Tensor]
    redraw: Callable[[Sequence[int], int], Tensor] | None = None


@dataclass(frozen=True)
class Diversity:
    """What the column `diversity` is: of `prompts` prompts, spread evenly over the set, each
    system that has `redraw` draws `images` images; the value of a prompt is their mean pairwise
    cosine distance under `features` ((B, 3, H, W) in [0, 1] to unit vectors (B, D)). The mean, its
    interval and the paired comparisons are over these prompts. The Vendi score of the same images
    stands beside it, and is not compared: a second reading of one measurement would only make
    Holm's correction harsher on all others.

    With `reference`, a system's name, the CMMD of every other system's images to its images.
    """

    features: Features
    prompts: int = 64
    images: int = 4
    reference: str | None = None


@dataclass(frozen=True)
class AtSize:
    """Samples of one size: of the prompts with the numbers `rows`, by `systems`, which are those of
    the evaluation in its order. `name` is the size's, "" where there is one size alone.

    `folder`: whether a prompt has samples of other sizes too, so that this size's need a folder.
    """

    name: str
    rows: Sequence[int]
    systems: Sequence[System]
    folder: bool = False

    def place(self, system: str) -> str:
        """The folder of a system's samples of this size, below that of all samples."""
        return f"{system}/{self.name}" if self.folder else system


@dataclass(frozen=True)
class Measured:
    """What one system gave at one size: scores by reward, of the prompts `rows`; of the prompts
    `groups`, where diversity was asked for, the mean distance and Vendi score; the first images,
    and features (N, D)."""

    rows: Sequence[int]
    scores: dict[str, Array]
    groups: Sequence[int]
    diversity: Array | None
    vendi: Array | None
    images: NDArray[np.uint8] | None
    features: Tensor | None


def by_prompt(parts: Sequence[tuple[Sequence[int], Array]], count: int) -> Array:
    """The values of those of `count` prompts that have some, each the mean over its sizes."""
    sums, times = np.zeros(count), np.zeros(count)
    for rows, values in parts:
        sums[list(rows)] += values
        times[list(rows)] += 1
    return sums[times > 0] / times[times > 0]


@dataclass(frozen=True)
class Job:
    """What every system is measured on."""

    prompts: Sequence[PromptLike]
    sizes: Sequence[AtSize]
    rewards: Sequence[Reward]
    batch: int
    diversity: Diversity | None
    keep: int
    take: Take
    save_images: SaveImages | None
    ranks: Ranks
    medium: Medium
    examined: Examined = field(default_factory=Examined)

    @property
    def groups(self) -> list[int]:
        """The prompts that diversity is measured on."""
        return spread(len(self.prompts), self.diversity.prompts) if self.diversity else []

    def measure(self, number: int, progress: Progress | None) -> list[Measured]:
        """The evaluation's system of that number, size by size."""
        systems = [size.systems[number] for size in self.sizes]
        total = sum(map(self._total, systems, self.sizes))
        report = _counted(progress, systems[0].name, total)
        return [self._at(*pair, report) for pair in zip(systems, self.sizes, strict=True)]

    def _total(self, system: System, size: AtSize) -> int:
        """How many samples this rank makes."""
        drawn = len(self._mine(self._groups(system, size)))
        return len(self._mine(size.rows)) + drawn * (self.diversity.images if self.diversity else 0)

    def _groups(self, system: System, size: AtSize) -> list[int]:
        """Those of `groups` that have this size, if the system draws again."""
        if system.redraw is None:
            return []
        among = set(size.rows)
        return [row for row in self.groups if row in among]

    def _mine(self, rows: Sequence[int]) -> list[int]:
        """This rank's part of some prompts."""
        return [rows[i] for i in self.ranks.spread(len(rows))] if rows else []

    def _at(self, system: System, size: AtSize, report: Callable[[int], None]) -> Measured:
        parts, groups = [], self._groups(system, size)
        for number, rows in enumerate(self._batches(self._mine(size.rows))):
            make = partial(self._scored, system, size, rows)
            parts.append(self.take(f"{size.place(system.name)}/{_chunk(number, rows)}", make))
            report(len(rows))

        def whole(key: str) -> Tensor:
            return self.ranks.collect(torch.cat([part[key] for part in parts]), len(size.rows))

        scores = {r.name: _double(whole(f"score/{r.name}")) for r in self.rewards}
        drawn = self._drawn(system, size, groups, report) if groups else None
        kept = [part["pixels"].numpy() for part in parts if "pixels" in part]
        return Measured(
            size.rows,
            scores,
            groups,
            _double(pairwise_distance(drawn)) if drawn is not None else None,
            _double(vendi_score(drawn)) if drawn is not None else None,
            np.concatenate(kept) if kept else None,
            whole("features") if "features" in parts[0] else None,
        )

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Indices in batches."""
        starts = range(0, len(indices), self.batch)
        return [list(indices[start : start + self.batch]) for start in starts]

    @torch.no_grad()
    def _scored(self, system: System, size: AtSize, rows: list[int]) -> Made:
        """The scores of a batch, its features for CMMD, and those of its images that are kept."""
        images = self._rounded(system.name, system.sample(rows), len(rows))
        texts = [self.prompts[i].text for i in rows]
        metadata = [self.prompts[i].metadata for i in rows]
        made = {}
        for reward in self.rewards:
            scores = checked(reward, images, texts, metadata)
            self.examined.look(reward, images, texts, metadata, scores)
            made[f"score/{reward.name}"] = scores.cpu()
        if self.save_images is not None:
            self.save_images(size.place(system.name), rows, self.medium.encode(images))
        if self.diversity is not None and self.diversity.reference is not None:
            made["features"] = self.diversity.features(images).float().cpu()
        draw = self.medium.sheet
        if draw is not None and rows[0] < self.keep and len(self.sizes) == 1:
            pictures = [draw(image, 1) for image in images[: self.keep - rows[0]].split(1)]
            made["pixels"] = torch.from_numpy(np.stack(pictures))
        return made

    def _drawn(
        self, system: System, size: AtSize, groups: Sequence[int], report: Callable[[int], None]
    ) -> Tensor:
        """The features (G, images, D) of several draws of the prompts `groups`."""
        assert self.diversity is not None
        draws = []
        for draw in range(self.diversity.images):
            parts = []
            for number, rows in enumerate(self._batches(self._mine(groups))):
                make = partial(self._redrawn, system, self.diversity, rows, draw)
                key = f"{size.place(system.name)}/draw{draw}-{_chunk(number, rows)}"
                parts.append(self.take(key, make)["features"])
                report(len(rows))
            draws.append(torch.cat(parts))
        return self.ranks.collect(torch.stack(draws, 1), len(groups))

    @torch.no_grad()
    def _redrawn(self, system: System, diversity: Diversity, rows: list[int], draw: int) -> Made:
        assert system.redraw is not None
        images = self._rounded(system.name, system.redraw(rows, draw), len(rows))
        return {"features": diversity.features(images).float().cpu()}

    def _rounded(self, name: str, samples: Tensor, count: int) -> Tensor:
        """A system's samples as files hold them.

        Raises:
            ValueError: if they are too few, or not the medium's.
        """
        samples = samples.detach().float()
        if len(samples) != count:
            raise ValueError(
                f"system {name!r} gave {len(samples)} {self.medium.name} for {count} prompts"
            )
        try:
            fault = self.medium.check(samples)
        except ValueError as error:
            raise ValueError(f"system {name!r}: its medium {error}") from error
        if fault is not None:
            what = fault.what if fault.finite else f"{self.medium.one} that is not finite"
            raise ValueError(f"system {name!r} gave {article(what)} {what}")
        return self.medium.rounded(samples)


def _chunk(number: int, rows: Sequence[int]) -> str:
    """A batch's name among a system's. Its first row alone is that of two batches where a rank
    repeats the last row; its number alone is that of two where each size has prompts of its own."""
    return f"batch-{number:06d}-from-{rows[0]:06d}"


def _double(values: Tensor) -> Array:
    made: Array = values.double().numpy()
    return made


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices (at least two, at most all) spread evenly over range(total)."""
    count = min(max(wanted, 2), total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def _counted(progress: Progress | None, name: str, total: int) -> Callable[[int], None]:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(name, done, total)

    return report
