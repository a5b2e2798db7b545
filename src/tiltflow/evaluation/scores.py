"""Score several systems on the same prompts and noise, and compare them prompt by prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.distributed import Ranks
from tiltflow.evaluation.diversity import pairwise_distance
from tiltflow.evaluation.statistics import holm, mean_ci, paired_comparison
from tiltflow.rewards.base import RANGE_TOLERANCE, Reward, checked

DIVERSITY = "diversity"
KEPT_IMAGES = 24
ALONE = Ranks()

Progress = Callable[[str, int, int], None]


class PromptLike(Protocol):
    """A prompt's text and what else is known about it."""

    @property
    def text(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class System:
    """Something that makes an image of a prompt in `nfe` evaluations of a network.

    `sample(indices)` gives the images (B, 3, H, W) in [0, 1] (or points (B, D)) of the prompts
    with these indices; the noise depends on the index alone, so systems are compared on the same
    noise. `redraw(indices, draw)`, where there is one, does the same from the noise number `draw`
    = 0, 1, …; it is what diversity is measured on.
    """

    name: str
    nfe: int
    sample: Callable[[Sequence[int]], Tensor]
    redraw: Callable[[Sequence[int], int], Tensor] | None = None


@dataclass(frozen=True)
class Diversity:
    """What the column `diversity` is: of `prompts` prompts, spread evenly over the set, each
    system that has `redraw` draws `images` images; the value of a prompt is their mean pairwise
    cosine distance under `features` ((B, 3, H, W) in [0, 1] to (B, D)). The mean, its interval
    and the paired comparisons are over these prompts.
    """

    features: Callable[[Tensor], Tensor]
    prompts: int = 64
    images: int = 4


@dataclass(frozen=True)
class Evaluation:
    """`summary` is the content of `evaluation.json`; `scores[system][reward]` are the values by
    prompt, (N,); `images[system]` are the first images, (n, H, W, 3) uint8 (none for points).
    """

    summary: dict[str, Any]
    scores: dict[str, dict[str, NDArray[np.float64]]]
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


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
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Sample every system on every prompt, score with every reward, compare the named pairs.

    Images are rounded to eight bits before they are scored, so the figures are those of the
    saved files, and no more than `keep` of a system are held. `progress(system, done, total)` is
    called after each batch, in images.

    Prompts are split over `ranks`; every rank returns all scores, and the images of its own part
    (rank 0 has the first ones).

    Raises:
        ValueError: if names repeat or a comparison names no system, there are fewer than two
            prompts, or a reward fails.
    """
    _check(systems, prompts, rewards, batch_size, comparisons)
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    images: dict[str, NDArray[np.uint8]] = {}
    for system in systems:
        extra = diversity if system.redraw is not None else None
        groups = _spread(len(prompts), extra.prompts) if extra else []
        drawn = len(ranks.spread(len(groups))) * extra.images if extra else 0
        report = _counted(progress, system.name, len(ranks.spread(len(prompts))) + drawn)
        scores[system.name], kept = _score(
            system, prompts, rewards, batch_size, report, keep, ranks
        )
        if kept is not None:
            images[system.name] = kept
        if extra:
            mine = [groups[i] for i in ranks.spread(len(groups))]
            found = _diversity(system, extra, mine, batch_size, report)
            scores[system.name][DIVERSITY] = _collected(found, len(groups), ranks)
    summary = {
        "prompts": len(prompts),
        "systems": {
            s.name: {"nfe": s.nfe, "scores": {k: _interval(v) for k, v in scores[s.name].items()}}
            for s in systems
        },
        "comparisons": compare(scores, comparisons),
    }
    return Evaluation(summary, scores, images)


def compare(
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The `comparisons` of `evaluation.json`: every pair (a, b) on every reward both have.

    `difference` is a − b; `p_holm` is the p-value adjusted for the number of comparisons here.
    """
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        for reward in (name for name in scores[a] if name in scores[b]):
            result = paired_comparison(scores[a][reward], scores[b][reward])
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "reward": reward,
                    "difference": result.difference,
                    "ci95": list(result.ci95),
                    "p_value": result.p_value,
                    "test": result.test,
                    "n": result.n,
                    "win_rate": result.win_rate,
                }
            )
    for row, adjusted in zip(rows, holm([r["p_value"] for r in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def write_evaluation(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write `evaluation.json` in one step: readers see the old file or the whole new one."""
    path = Path(path)
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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


def _score(
    system: System,
    prompts: Sequence[PromptLike],
    rewards: Sequence[Reward],
    batch_size: int,
    report: Callable[[int], None],
    keep: int,
    ranks: Ranks,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.uint8] | None]:
    """The scores (N,) by reward, and the first `keep` images of this rank's part."""
    columns: dict[str, list[Tensor]] = {r.name: [] for r in rewards}
    kept: list[NDArray[np.uint8]] = []
    mine = ranks.spread(len(prompts))
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        with torch.no_grad():
            images, pixels = _rounded(system.name, system.sample(indices), len(indices))
        texts = [prompts[i].text for i in indices]
        metadata = [prompts[i].metadata for i in indices]
        for reward in rewards:
            with torch.no_grad():
                columns[reward.name].append(checked(reward, images, texts, metadata).cpu())
        if pixels is not None and start < keep:
            kept.append(pixels[: keep - start])
        report(len(indices))
    scores = {
        name: _collected(torch.cat(parts).double().numpy(), len(prompts), ranks)
        for name, parts in columns.items()
    }
    return scores, np.concatenate(kept) if kept else None


def _collected(values: NDArray[np.float64], n: int, ranks: Ranks) -> NDArray[np.float64]:
    """All n values from every rank's part of them."""
    found: NDArray[np.float64] = ranks.collect(torch.from_numpy(values), n).numpy()
    return found


def _diversity(
    system: System,
    diversity: Diversity,
    indices: Sequence[int],
    batch_size: int,
    report: Callable[[int], None],
) -> NDArray[np.float64]:
    """The mean pairwise distance of each prompt's images, (len(indices),)."""
    assert system.redraw is not None
    draws = []
    for draw in range(diversity.images):
        parts = []
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            with torch.no_grad():
                images, _ = _rounded(system.name, system.redraw(batch, draw), len(batch))
                parts.append(diversity.features(images).float().cpu())
            report(len(batch))
        draws.append(torch.cat(parts))
    return pairwise_distance(torch.stack(draws, 1)).double().numpy()


def _rounded(name: str, images: Tensor, count: int) -> tuple[Tensor, NDArray[np.uint8] | None]:
    """Images as eight bits hold them, and these bits (B, H, W, 3); points as they are."""
    images = images.detach().float()
    if len(images) != count:
        raise ValueError(f"system {name!r} gave {len(images)} images for {count} prompts")
    if images.ndim == 2:
        return images, None
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"system {name!r} gave an image that is not finite")
    if bool((images < -RANGE_TOLERANCE).any() | (images > 1 + RANGE_TOLERANCE).any()):
        raise ValueError(f"system {name!r} gave an image outside [0, 1]")
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.float() / 255, pixels.permute(0, 2, 3, 1).cpu().numpy()


def _spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices (at least two, at most all) spread evenly over range(total)."""
    count = min(max(wanted, 2), total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def _interval(values: NDArray[np.float64]) -> dict[str, Any]:
    mean, low, high = mean_ci(values)
    return {"mean": mean, "ci95": [low, high]}


def _counted(progress: Progress | None, name: str, total: int) -> Callable[[int], None]:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(name, done, total)

    return report
