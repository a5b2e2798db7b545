"""Intervals and paired tests over prompts: how sure a difference between two systems is.

Several images of one prompt are no independent draws from the prompts that there are. So where
prompts repeat, what is said of the mean is cluster-robust: a prompt's scores count as one term
(Liang and Zeger 1986, with the factor G/(G − 1) and a t distribution of G − 1 degrees of freedom
for G prompts). Where none repeats it is the plain t test. The mean of scores that are all 0 or 1 is
a share, and has a share's interval (`score_ci`); a difference of two systems has that of t.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its parts are imported when they are first used, and statistics cost a second
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Clusters = Sequence[Hashable] | None
"""What each score is of, such as its prompt's text; None where no two are of the same. Where all
are of one, there is nothing but its own noise to go by, and the scores count one by one."""

SIGNIFICANT = 0.05
"""Below this corrected p-value, and by it alone, two systems are called different."""
NO_DIFFERENCE = "no significant difference"


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same prompts: the mean of a − b, its 95% interval, a two-sided p-value.

    `win_rate` is the share of prompts where a is better, ties counted half. `test` names the
    test that gave the p-value.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    n: int
    win_rate: float
    test: str = "paired t"


def mean_ci(
    scores: ArrayLike, level: float = 0.95, clusters: Clusters = None
) -> tuple[float, float, float]:
    """The mean of (n,) scores and its t interval (mean, low, high), n >= 2.

    Raises:
        ValueError: if there are fewer than two scores, one is not finite, or there are not as many
            `clusters`.
    """
    values = _vector(scores)
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must lie in (0, 1), got {level}")
    mean = float(values.mean())
    error, freedom = standard_error(values, clusters)
    half = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * error
    return mean, mean - half, mean + half


def score_ci(
    scores: ArrayLike, level: float = 0.95, clusters: Clusters = None
) -> tuple[float, float, float]:
    """The mean of one system's (n,) scores and its interval (mean, low, high), n >= 2: that of a
    share (`proportion_ci`) where every score is 0 or 1, else that of t (`mean_ci`).

    Of 0/1 scores near an end, t's interval is far too short, and has no width where all are alike:
    of 80 at a rate of .99 it holds the rate 55 times of 100. The share's is not centred on it.

    Raises:
        ValueError: as `mean_ci`.
    """
    values = _vector(scores)
    return (proportion_ci if all_hits(values) else mean_ci)(values, level, clusters)


def all_hits(values: Array) -> bool:
    """Whether every score is 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def paired_comparison(a: ArrayLike, b: ArrayLike, clusters: Clusters = None) -> Comparison:
    """Compare (n,) scores of two systems on the same prompts by the paired t test, n >= 2.

    Where the differences of all prompts are equal the t test has no variance to go by: no
    difference gives p = 1; one and the same shift everywhere is judged by the exact sign test,
    p = 2^(1−n), or 2^(1−G) for G clusters.

    Raises:
        ValueError: if the lengths differ, or there are fewer than two finite scores each.
    """
    first, second = _vector(a), _vector(b)
    if len(first) != len(second):
        raise ValueError(f"a paired comparison of {len(first)} with {len(second)} scores")
    differences = first - second
    remains = rounding(first, second)
    n, test = len(differences), "paired t"
    error, freedom = standard_error(differences, clusters)
    if error <= remains:  # images may differ where their prompts' means do not
        shifted = abs(differences.mean()) > remains
        p_value, test = (2.0**-freedom, "sign") if shifted else (1.0, test)
    else:
        p_value = float(2 * scipy.stats.t.sf(abs(differences.mean()) / error, freedom))
    mean, low, high = mean_ci(differences, clusters=clusters)
    wins = float(((differences > 0) + 0.5 * (differences == 0)).mean())
    return Comparison(mean, (low, high), p_value, n, wins, test)


def proportion_ci(
    hits: ArrayLike, level: float = 0.95, clusters: Clusters = None
) -> tuple[float, float, float]:
    """The share of (n,) hits (1, else 0) and its Wilson interval (share, low, high), n >= 2.

    Where clusters repeat, n is the effective number of hits: that of independent ones whose share
    has the cluster-robust standard error, in t's terms (Korn and Graubard 1998, Franco et al. 2019,
    doi 10.1093/jssam/smy019), n at most.

    Raises:
        ValueError: as `mean_ci`.
    """
    values = _vector(hits)
    share, effective = float(values.mean()), float(len(values))
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    codes = _codes(clusters, len(values))
    if codes is not None:
        freedom = int(codes.max())
        ratio = z / float(scipy.stats.t.ppf((1 + level) / 2, freedom))
        effective = min(effective, effective / _design(values, codes, z) * ratio**2)
    weight = z**2 / effective
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / effective + weight / (4 * effective)) / (1 + weight)
    return share, max(0.0, middle - half), min(1.0, middle + half)


def _design(hits: Array, codes: NDArray[np.intp], z: float) -> float:
    """The design effect of (n,) hits: how often the variance of their share is that of independent
    ones.

    The cluster-robust variance over p (1 − p) / n is d, for a rare outcome nearly the mean number
    of rare outcomes in the cluster of one, so a handful of these tells little of it, and none
    nothing. Wilson's interval takes z²/2 outcomes of either kind for granted. These are taken to
    lie in clusters that are all alike, where the effect is D = Σ m² / n of clusters of m hits: with
    A outcomes of the rarer kind it is (A d + z²/2 D) / (A + z²/2). So in the middle it is d nearly,
    at an end D, and then of n/D hits, as many as there are clusters where these are of one size.
    It is D, too, where the robust variance is 0 for another reason.
    """
    n, share = len(hits), float(hits.mean())
    error, _ = standard_error(hits, codes.tolist())
    alike = float(np.square(np.bincount(codes)).sum()) / n
    if error <= rounding(hits):
        return alike
    found, rare = n * error**2 / (share * (1 - share)), n * min(share, 1 - share)
    return (rare * found + z**2 / 2 * alike) / (rare + z**2 / 2)


def rounding(*values: Array) -> float:
    """What sums and differences of these may be off by: less would pass for a tiny variance."""
    return float(4 * np.finfo(np.float64).eps * max(np.abs(each).max() for each in values))


def standard_error(values: Array, clusters: Clusters = None) -> tuple[float, int]:
    """Of the mean of (n,) values, n >= 2, with its degrees of freedom.

    Raises:
        ValueError: if there are not as many `clusters`.
    """
    n, codes = len(values), _codes(clusters, len(values))
    if codes is None:
        return float(values.std(ddof=1)) / math.sqrt(n), n - 1
    sums = np.bincount(codes, values - values.mean())
    groups = len(sums)
    return math.sqrt(groups / (groups - 1) * float(np.square(sums).sum())) / n, groups - 1


def cluster_means(values: Array, clusters: Clusters) -> Array:
    """The mean of each cluster's values, in the clusters' order; the values themselves where there
    is nothing to take together."""
    codes = _codes(clusters, len(values))
    return values if codes is None else np.bincount(codes, values) / np.bincount(codes)


def bootstrap_ci(
    differences: ArrayLike,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
    clusters: Clusters = None,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of (n,) differences; no normality assumed.
    Clusters are drawn whole."""
    values = _vector(differences)
    codes = _codes(clusters, len(values))
    each = np.arange(len(values)) if codes is None else codes
    found = scipy.stats.bootstrap(
        (np.bincount(each, values), np.bincount(each)),
        _mean_of_sums,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(values)),  # bounds the memory of the resampled indices
        confidence_level=level,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values in [0, 1] for their number, in the given order.

    Adjusted values under .05 keep the chance of any false finding among them under 5%.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("p-values must lie in [0, 1]")
    order = np.argsort(values, kind="stable")
    steps = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in adjusted]


def correct(rows: Sequence[dict[str, Any]], p: str = "p_value", into: str = "p_holm") -> None:
    """Gives each of the comparisons that are shown together, rows of an `evaluation.json`, its
    p-value `p` after `holm`'s adjustment for their number, as `into`."""
    for row, adjusted in zip(rows, holm([row[p] for row in rows]), strict=True):
        row[into] = adjusted


def verdict(row: Mapping[str, Any]) -> str:
    """A comparison's one verdict, "higher", "lower" or `NO_DIFFERENCE`: by its corrected p-value,
    or its plain one where it was the only one and has no other."""
    p = row["p_holm"] if "p_holm" in row else row["p_value"]
    if p >= SIGNIFICANT:
        return NO_DIFFERENCE
    return "higher" if row["difference"] > 0 else "lower"


def _mean_of_sums(sums: Array, sizes: NDArray[np.intp], axis: int = -1) -> Array:
    found: Array = sums.sum(axis) / sizes.sum(axis)
    return found


def _codes(clusters: Clusters, n: int) -> NDArray[np.intp] | None:
    """The clusters as numbers (n,) from 0; None where each score is a cluster, or all are one."""
    if clusters is None:
        return None
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} scores")
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(each, len(numbers)) for each in clusters], dtype=np.intp)
    return codes if 1 < len(numbers) < n else None


def _vector(scores: ArrayLike) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"statistics need two or more scores in a row, got {values.shape}")
    if not bool(np.isfinite(values).all()):
        raise ValueError("statistics need finite scores")
    return values
