"""Means and differences over prompts and over seeds: scores (S, N) of S seeds on N prompts.

Two intervals stand beside each other. That over prompts is of the seeds' mean at each prompt: these
trained networks on other prompts. That over seeds is of each seed's mean: other runs on these
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltflow.evaluation.statistics import (
    Clusters,
    all_hits,
    correct,
    mean_ci,
    paired_comparison,
    proportion_ci,
)

Array = NDArray[np.float64]
Scores = Mapping[int, Array]
"""By seed, the scores (N,) of a system under one reward."""


def over_seeds(scores: Scores, clusters: Clusters = None) -> dict[str, Any]:
    """`mean`, its 95% interval over prompts (`ci95`) and over seeds (`seeds_ci95`, None of a single
    seed), and each seed's mean (`by_seed`). `clusters`: the prompts, where some repeat. Of scores
    that are all 0 or 1 the interval over prompts is that of a share, of which a prompt has one hit
    a seed."""
    table = _table(scores, list(scores))
    each = table.mean(1)
    if all_hits(table):
        of = np.arange(table.shape[1]).tolist() if clusters is None else list(clusters)
        mean, low, high = proportion_ci(table.ravel(), clusters=of * len(table))
    else:
        mean, low, high = mean_ci(table.mean(0), clusters=clusters)
    return {
        "mean": mean,
        "ci95": [low, high],
        "seeds_ci95": _seeds_ci(each),
        "by_seed": {str(seed): float(value) for seed, value in zip(scores, each, strict=True)},
    }


def paired_over_seeds(a: Scores, b: Scores, clusters: Clusters = None) -> dict[str, Any] | None:
    """a − b on the prompts and seeds that both have; None without a seed in common.

    `p_value` is the paired t test's over prompts, `p_seeds` its over seeds (None of a single one).
    """
    common = [seed for seed in a if seed in b]
    if not common:
        return None
    first, second = _table(a, common), _table(b, common)
    result = paired_comparison(first.mean(0), second.mean(0), clusters)
    means = first.mean(1), second.mean(1)
    return {
        "difference": result.difference,
        "ci95": list(result.ci95),
        "p_value": result.p_value,
        "test": result.test,
        "n": result.n,
        "win_rate": result.win_rate,
        "seeds": common,
        "seeds_ci95": _seeds_ci(means[0] - means[1]),
        "p_seeds": paired_comparison(*means).p_value if len(common) > 1 else None,
    }


def compared(
    scores: Mapping[str, Mapping[str, Scores]],
    pairs: Sequence[tuple[str, str]],
    clusters: Callable[[int], Clusters] = lambda n: None,
) -> list[dict[str, Any]]:
    """Each pair (a, b) of systems under each reward, `scores[system][reward]`, as rows of an
    `evaluation.json`; `p_holm` is corrected for all of them, `p_seeds_holm` for those with seeds.
    `clusters(n)`: the prompts that `n` scores are of.
    """
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        for reward in (name for name in scores[a] if name in scores[b]):
            first, second = scores[a][reward], scores[b][reward]
            found = paired_over_seeds(first, second, clusters(len(next(iter(first.values())))))
            if found is not None:
                rows.append({"a": a, "b": b, "reward": reward, **found})
    correct(rows)
    correct([row for row in rows if row["p_seeds"] is not None], "p_seeds", "p_seeds_holm")
    return rows


def caveat(row: Mapping[str, Any]) -> str:
    """What a verdict over prompts leaves open about a comparison of runs: that it is of one seed,
    or that the seeds' own interval has 0 in it; "" of neither, or of no runs."""
    if "seeds" not in row:
        return ""
    interval = row["seeds_ci95"]
    if interval is None:
        return ", of one seed"
    return "" if interval[0] * interval[1] > 0 else ", but the seeds' interval has 0 in it"


def named(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _table(scores: Scores, seeds: Sequence[int]) -> Array:
    return np.stack([scores[seed] for seed in seeds])


def _seeds_ci(means: Array) -> list[float] | None:
    return [float(x) for x in mean_ci(means)[1:]] if len(means) > 1 else None
