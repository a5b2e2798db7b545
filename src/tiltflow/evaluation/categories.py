"""Scores by category of prompt, for suites such as GenEval that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltflow.evaluation.statistics import score_ci

Scores = Mapping[str, Mapping[str, NDArray[np.float64]]]


def category_of(metadata: Mapping[str, object]) -> str | None:
    """The category of a prompt, a text or a whole number: a general `category`, GenEval's (and the
    shapes world's) `tag`, or GenEval2's number of atoms; None where there is none of them."""
    for key in ("category", "tag"):
        value = metadata.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value)
    atoms = metadata.get("atom_count")
    return f"{atoms} atoms" if isinstance(atoms, int) else None


def by_category(
    metadata: Sequence[Mapping[str, object]], scores: Scores, texts: Sequence[str]
) -> dict[str, Any]:
    """The `categories` of `evaluation.json`: {CATEGORY: {"prompts": n, "systems": {SYSTEM:
    {REWARD: {"mean": x, "ci95": [lo, hi] or null}}}}}; empty where a prompt has no category.

    An interval needs two prompts; `texts` are the prompts, of which some may repeat. Rewards that
    were not measured on every prompt are left out.
    """
    found = [category_of(about) for about in metadata]
    names = list(dict.fromkeys(found))
    if None in names or len(names) < 2:
        return {}
    table: dict[str, Any] = {}
    for name in sorted(str(n) for n in names):
        rows = np.array([i for i, category in enumerate(found) if category == name])
        table[name] = {
            "prompts": len(rows),
            "systems": {
                system: {
                    reward: figures_of(values[rows], [texts[i] for i in rows])
                    for reward, values in columns.items()
                    if len(values) == len(found)
                }
                for system, columns in scores.items()
            },
        }
    return table


def category_means(categories: Mapping[str, Any], system: str) -> dict[str, float]:
    """By reward, the mean over the categories of their means: GenEval's overall score (its
    summary_scores.py), which weighs categories alike whatever their number of prompts."""
    tables = [category["systems"][system] for category in categories.values()]
    return {r: float(np.mean([table[r]["mean"] for table in tables])) for r in tables[0]}


def figures_of(values: NDArray[np.float64], texts: Sequence[str]) -> dict[str, Any]:
    """The mean of scores of these prompts and its 95% interval, None of one."""
    if len(values) < 2:
        return {"mean": float(values.mean()), "ci95": None}
    mean, low, high = score_ci(values, clusters=texts)
    return {"mean": mean, "ci95": [low, high]}
