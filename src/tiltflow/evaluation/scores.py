"""Score several systems on the same prompts and noise, and compare them prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.evaluation.categories import by_category, category_means
from tiltflow.evaluation.chunks import Made, Take, make_anew
from tiltflow.evaluation.diversity import cmmd, pairwise_distance, vendi_score
from tiltflow.evaluation.statistics import bootstrap_ci, correct, mean_ci, paired_comparison
from tiltflow.models.medium import Features, Medium, article
from tiltflow.rewards.base import Reward, check_medium, checked, medium_of

DIVERSITY = "diversity"
KEPT_IMAGES = 24

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
class Evaluation:
    """`summary` is the content of `evaluation.json`; `scores[system][reward]` are the values by
    prompt, (N,), or those of the prompts `measured[reward]` where it is there;
    `images[system]` are pictures of the first samples, (n, H, W, 3) uint8, where there are any.
    """

    summary: dict[str, Any]
    scores: dict[str, dict[str, NDArray[np.float64]]]
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    measured: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    """What one system gave: its scores, first images, Vendi scores (G,) and features (N, D)."""

    scores: dict[str, NDArray[np.float64]]
    images: NDArray[np.uint8] | None
    vendi: NDArray[np.float64] | None
    features: Tensor | None


def evaluate_systems(
    systems: Sequence[System],
    prompts: Sequence[PromptLike],
    rewards: Sequence[Reward],
    batch_size: int,
    progress: Progress | None = None,
    *,
    comparisons: Sequence[tuple[str, str]] = (),
    diversity: Diversity | None = None,
    keep: int = KEPT_IMAGES,
    take: Take = make_anew,
    save_images: SaveImages | None = None,
    ranks: Ranks = ALONE,
    medium: Medium | None = None,
) -> Evaluation:
    """Sample every system on every prompt, score with every reward, compare the named pairs.

    Samples of `medium` (None: the first reward's) are rounded as files hold them before they are
    scored (images: to eight bits), so the figures are those of the saved files, and no more than
    `keep` of a system are held. `progress(system, done, total)` is called after each batch, in
    samples. `take` may keep the results of a batch, and give them back in place of making them;
    `save_images(system, indices, encoded)` gets every batch that is made. Both see this rank's
    batches only.

    Prompts are split over `ranks`; every rank returns all scores, and the images of its own part
    (rank 0 has the first ones).

    Raises:
        ValueError: if names repeat or a comparison names no system, there are fewer than two
            prompts, or a reward fails.
    """
    _check(systems, prompts, rewards, batch_size, comparisons)
    of = medium or medium_of(rewards[0])
    check_medium(rewards, of)
    job = _Job(prompts, rewards, batch_size, diversity, keep, take, save_images, ranks, of)
    found = {system.name: job.measure(system, progress) for system in systems}
    scores = {name: measured.scores for name, measured in found.items()}
    texts = [prompt.text for prompt in prompts]
    categories = by_category([p.metadata for p in prompts], scores, texts)
    summary: dict[str, Any] = {"prompts": len(prompts), "systems": {}}
    for system in systems:
        measured = found[system.name]
        table = {r: _interval(values, texts) for r, values in measured.scores.items()}
        summary["systems"][system.name] = {"nfe": system.nfe, "scores": table}
        if measured.vendi is not None:
            summary["systems"][system.name]["vendi"] = _interval(measured.vendi, texts)
        distance = _distance(found, system.name, diversity)
        if distance is not None:
            summary["systems"][system.name]["cmmd"] = distance
        if categories:
            means = category_means(categories, system.name)
            summary["systems"][system.name]["category_means"] = means
    summary["comparisons"] = compare(scores, comparisons, texts)
    if categories:
        summary["categories"] = categories
    images = {name: m.images for name, m in found.items() if m.images is not None}
    some = {DIVERSITY: job.groups} if any(m.vendi is not None for m in found.values()) else {}
    return Evaluation(summary, scores, images, some)


def _distance(
    found: Mapping[str, _Measured], name: str, diversity: Diversity | None
) -> float | None:
    """The CMMD of a system to the reference, where both have features and are not the same."""
    reference = found.get(diversity.reference or "") if diversity else None
    features = found[name].features
    if reference is None or reference is found[name]:
        return None
    if reference.features is None or features is None:
        return None
    return cmmd(features, reference.features)


def compare(
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]],
    pairs: Sequence[tuple[str, str]],
    texts: Sequence[str],
    resamples: int = 10_000,
) -> list[dict[str, Any]]:
    """The `comparisons` of `evaluation.json`: every pair (a, b) on every reward both have.
    `texts` are the prompts, of which some may repeat.

    `difference` is a − b; `ci95` its t interval and `bootstrap_ci95` that of `resamples`
    resamples; `p_holm` is the p-value adjusted for the number of comparisons here.
    """
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        for reward in (name for name in scores[a] if name in scores[b]):
            first, second = scores[a][reward], scores[b][reward]
            of = texts_of(texts, len(first))
            result = paired_comparison(first, second, of)
            spread = bootstrap_ci(first - second, 0, resamples=resamples, clusters=of)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "reward": reward,
                    "difference": result.difference,
                    "ci95": list(result.ci95),
                    "bootstrap_ci95": list(spread),
                    "p_value": result.p_value,
                    "test": result.test,
                    "n": result.n,
                    "win_rate": result.win_rate,
                }
            )
    correct(rows)
    return rows


def _check(
    systems: Sequence[System],
    prompts: Sequence[PromptLike],
    rewards: Sequence[Reward],
    batch_size: int,
    comparisons: Sequence[tuple[str, str]],
) -> None:
    if not systems or not rewards:
        raise ValueError("an evaluation needs at least one system and one reward")
    if len(prompts) < 2:
        raise ValueError("an evaluation needs at least two prompts, or there is no interval")
    if batch_size < 1:
        raise ValueError(f"the batch size of an evaluation must be 1 or more, got {batch_size}")
    names = [s.name for s in systems]
    for what, given in (("system", names), ("reward", [r.name for r in rewards])):
        repeated = [name for name in given if given.count(name) > 1]
        if repeated:
            raise ValueError(f"the {what} {repeated[0]!r} is given twice")
    if any(r.name == DIVERSITY for r in rewards):
        raise ValueError(f"{DIVERSITY!r} is measured on the systems and is no reward's name")
    for name in (name for pair in comparisons for name in pair):
        if name not in names:
            raise ValueError(f"a comparison names {name!r}; the systems are {', '.join(names)}")


@dataclass(frozen=True)
class _Job:
    """What every system is measured on."""

    prompts: Sequence[PromptLike]
    rewards: Sequence[Reward]
    batch: int
    diversity: Diversity | None
    keep: int
    take: Take
    save_images: SaveImages | None
    ranks: Ranks
    medium: Medium

    @property
    def groups(self) -> list[int]:
        """The prompts that diversity is measured on."""
        return _spread(len(self.prompts), self.diversity.prompts) if self.diversity else []

    def measure(self, system: System, progress: Progress | None) -> _Measured:
        extra = self.diversity if system.redraw is not None else None
        mine = self.ranks.spread(len(self.prompts))
        total = len(mine) + (len(self._own_groups()) * extra.images if extra else 0)
        report = _counted(progress, system.name, total)
        parts = []
        for rows in self._batches(mine):
            make = partial(self._scored, system, rows)
            parts.append(self.take(f"{system.name}/{rows[0]:06d}", make))
            report(len(rows))
        scores = {
            reward.name: self._whole([part[f"score/{reward.name}"] for part in parts])
            for reward in self.rewards
        }
        columns = {name: values.double().numpy() for name, values in scores.items()}
        vendi = None
        if extra:
            features = self._drawn(system, extra, report)
            columns[DIVERSITY] = pairwise_distance(features).double().numpy()
            vendi = vendi_score(features).double().numpy()
        kept = [part["pixels"].numpy() for part in parts if "pixels" in part]
        seen = [part["features"] for part in parts if "features" in part]
        return _Measured(
            columns,
            np.concatenate(kept) if kept else None,
            vendi,
            self._whole(seen) if seen else None,
        )

    def _own_groups(self) -> list[int]:
        """This rank's part of `groups`."""
        return [self.groups[i] for i in self.ranks.spread(len(self.groups))]

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all prompts from this rank's batches of them."""
        return self.ranks.collect(torch.cat(list(parts)), len(self.prompts))

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        starts = range(0, len(indices), self.batch)
        return [list(indices[start : start + self.batch]) for start in starts]

    @torch.no_grad()
    def _scored(self, system: System, rows: list[int]) -> Made:
        """The scores of a batch, its features for CMMD, and those of its images that are kept."""
        images = self._rounded(system.name, system.sample(rows), len(rows))
        texts = [self.prompts[i].text for i in rows]
        metadata = [self.prompts[i].metadata for i in rows]
        made = {
            f"score/{reward.name}": checked(reward, images, texts, metadata).cpu()
            for reward in self.rewards
        }
        if self.save_images is not None:
            self.save_images(system.name, rows, self.medium.encode(images))
        if self.diversity is not None and self.diversity.reference is not None:
            made["features"] = self.diversity.features(images).float().cpu()
        draw = self.medium.sheet
        if draw is not None and rows[0] < self.keep:
            pictures = [draw(image, 1) for image in images[: self.keep - rows[0]].split(1)]
            made["pixels"] = torch.from_numpy(np.stack(pictures))
        return made

    def _drawn(self, system: System, diversity: Diversity, report: Callable[[int], None]) -> Tensor:
        """The features (G, images, D) of several draws of the prompts `groups`."""
        draws = []
        for draw in range(diversity.images):
            parts = []
            for rows in self._batches(self._own_groups()):
                make = partial(self._redrawn, system, diversity, rows, draw)
                parts.append(self.take(f"{system.name}/draw{draw}-{rows[0]:06d}", make)["features"])
                report(len(rows))
            draws.append(torch.cat(parts))
        return self.ranks.collect(torch.stack(draws, 1), len(self.groups))

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


def _spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices (at least two, at most all) spread evenly over range(total)."""
    count = min(max(wanted, 2), total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def texts_of(texts: Sequence[str], n: int) -> Sequence[str]:
    """The prompts that `n` scores are of: all, or those that diversity is measured on."""
    return texts if n == len(texts) else [texts[i] for i in _spread(len(texts), n)]


def _interval(values: NDArray[np.float64], texts: Sequence[str]) -> dict[str, Any]:
    mean, low, high = mean_ci(values, clusters=texts_of(texts, len(values)))
    return {"mean": mean, "ci95": [low, high]}


def _counted(progress: Progress | None, name: str, total: int) -> Callable[[int], None]:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(name, done, total)

    return report
