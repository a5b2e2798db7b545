"""Score several systems on the same prompts and noise, and compare them prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.evaluation.categories import by_category, category_means, figures_of
from tiltflow.evaluation.chunks import Take, make_anew
from tiltflow.evaluation.diversity import cmmd
from tiltflow.evaluation.measuring import (
    DIVERSITY,
    Array,
    AtSize,
    Diversity,
    Job,
    Measured,
    Progress,
    PromptLike,
    SaveImages,
    System,
    by_prompt,
    spread,
)
from tiltflow.evaluation.statistics import bootstrap_ci, correct, paired_comparison, score_ci
from tiltflow.models.medium import Medium
from tiltflow.rewards.base import Reward, check_medium, medium_of

__all__ = ["AtSize", "Diversity", "Evaluation", "PromptLike", "System", "evaluate_systems"]

KEPT_IMAGES = 24


@dataclass(frozen=True)
class SizedScores:
    """`scores[system][reward]` at one size: values of the prompts `rows`, in their order."""

    rows: Sequence[int]
    scores: dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Evaluation:
    """`summary` is the content of `evaluation.json`; `scores[system][reward]` are the values by
    prompt, (N,), or those of the prompts `measured[reward]` where it is there;
    `images[system]` are pictures of the first samples, (n, H, W, 3) uint8, where there are any and
    all are of one size. Of several sizes, `sizes` has the scores of each; a prompt's score is then
    the mean over those that it has.
    """

    summary: dict[str, Any]
    scores: dict[str, dict[str, NDArray[np.float64]]]
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    measured: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, SizedScores] = field(default_factory=dict)


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
    sizes: Sequence[AtSize] = (),
) -> Evaluation:
    """Sample every system on every prompt, score with every reward, compare the named pairs.

    Samples of `medium` (None: the first reward's) are rounded as files hold them before they are
    scored (images: to eight bits), so the figures are those of the saved files, and no more than
    `keep` of a system are held. `progress(system, done, total)` is called after each batch, in
    samples. `take` may keep the results of a batch, and give them back in place of making them;
    `save_images(system, indices, encoded)` gets every batch that is made. Both see this rank's
    batches only.

    With `sizes`, samples are of these, and each prompt needs one at least. A batch is of one size.
    A prompt's score is the mean over its sizes, because the scores of one prompt are no independent
    ones; intervals and comparisons are over prompts. `summary["sizes"]` has the figures of each.

    Prompts are split over `ranks`; every rank returns all scores, and the images of its own part
    (rank 0 has the first ones).

    Raises:
        ValueError: if names repeat or a comparison names no system, there are fewer than two
            prompts, or a reward fails.
    """
    _check(systems, prompts, rewards, batch_size, comparisons)
    of = medium or medium_of(rewards[0])
    check_medium(rewards, of)
    chosen = sizes or [AtSize("", range(len(prompts)), systems)]
    assert {row for size in chosen for row in size.rows} == set(range(len(prompts)))
    job = Job(prompts, chosen, rewards, batch_size, diversity, keep, take, save_images, ranks, of)
    found = {system.name: job.measure(i, progress) for i, system in enumerate(systems)}
    scores = {name: _scores(parts, len(prompts)) for name, parts in found.items()}
    texts = [prompt.text for prompt in prompts]
    categories = by_category([p.metadata for p in prompts], scores, texts)
    beside = {s.name: _beside(found, s.name, diversity, texts) for s in systems}
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "systems": {s.name: _system(s, scores, beside, categories, texts) for s in systems},
        "comparisons": compare(scores, comparisons, texts),
    }
    if categories:
        summary["categories"] = categories
    sized = _by_size(chosen, found) if sizes else {}
    if sized:
        summary["sizes"] = {name: _size_figures(at, texts) for name, at in sized.items()}
    images = {n: made for n, parts in found.items() if (made := parts[0].images) is not None}
    some = {DIVERSITY: job.groups} if any(DIVERSITY in table for table in scores.values()) else {}
    return Evaluation(summary, scores, images, some, sized)


def _system(
    system: System,
    scores: Mapping[str, Mapping[str, Array]],
    beside: Mapping[str, Mapping[str, Any]],
    categories: Mapping[str, Any],
    texts: Sequence[str],
) -> dict[str, Any]:
    """A system's part of the summary."""
    table = {reward: _interval(values, texts) for reward, values in scores[system.name].items()}
    figures = {"nfe": system.nfe, "scores": table, **beside[system.name]}
    if categories:
        figures["category_means"] = category_means(categories, system.name)
    return figures


def _scores(parts: Sequence[Measured], count: int) -> dict[str, Array]:
    """A system's scores by prompt, and its diversity, where it has any, by prompt of those."""
    found = {
        reward: by_prompt([(part.rows, part.scores[reward]) for part in parts], count)
        for reward in parts[0].scores
    }
    drawn = [(part.groups, part.diversity) for part in parts if part.diversity is not None]
    return found | ({DIVERSITY: by_prompt(drawn, count)} if drawn else {})


def _by_size(
    sizes: Sequence[AtSize], found: Mapping[str, Sequence[Measured]]
) -> dict[str, SizedScores]:
    return {
        size.name: SizedScores(size.rows, {name: parts[i].scores for name, parts in found.items()})
        for i, size in enumerate(sizes)
    }


def _size_figures(at: SizedScores, texts: Sequence[str]) -> dict[str, Any]:
    own = [texts[row] for row in at.rows]
    systems = {
        system: {reward: figures_of(values, own) for reward, values in table.items()}
        for system, table in at.scores.items()
    }
    return {"prompts": len(at.rows), "systems": systems}


def _beside(
    found: Mapping[str, Sequence[Measured]],
    name: str,
    diversity: Diversity | None,
    texts: Sequence[str],
) -> dict[str, Any]:
    """A system's Vendi score, and the CMMD of its samples of all sizes to the reference's, where
    both have features and are not the same."""
    parts, beside = found[name], dict[str, Any]()
    drawn = [(part.groups, part.vendi) for part in parts if part.vendi is not None]
    if drawn:
        beside["vendi"] = _interval(by_prompt(drawn, len(texts)), texts)
    reference = found.get(diversity.reference or "") if diversity else None
    if reference is not None and reference is not parts:
        beside["cmmd"] = cmmd(_features(parts), _features(reference))
    return beside


def _features(parts: Sequence[Measured]) -> Tensor:
    return torch.cat([part.features for part in parts if part.features is not None])


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
            around = bootstrap_ci(first - second, 0, resamples=resamples, clusters=of)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "reward": reward,
                    "difference": result.difference,
                    "ci95": list(result.ci95),
                    "bootstrap_ci95": list(around),
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


def texts_of(texts: Sequence[str], n: int) -> Sequence[str]:
    """The prompts that `n` scores are of: all, or those that diversity is measured on."""
    return texts if n == len(texts) else [texts[i] for i in spread(len(texts), n)]


def _interval(values: NDArray[np.float64], texts: Sequence[str]) -> dict[str, Any]:
    mean, low, high = score_ci(values, clusters=texts_of(texts, len(values)))
    return {"mean": mean, "ci95": [low, high]}
