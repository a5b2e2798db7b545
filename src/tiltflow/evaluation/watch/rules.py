"""When the watch warns: rules over the paired series of a run (docs/watch.md).

All measurements are of the same prompts from the same noise, so every rule is a one-sided paired
test of a difference between two measurements, sample by sample, and asks for two things at
once: that the change is larger than a stated amount, and that this is no chance. Where samples
share a prompt they change together: a prompt then counts once (`evaluation/statistics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from tiltflow.evaluation.statistics import Clusters, cluster_means, rounding, standard_error
from tiltflow.evaluation.watch.history import TEACHER, Array, Measurement, alike, stretches
from tiltflow.evaluation.watch.settings import WatchRules

RISING = 0.05
"""The level at which a trained reward counts as risen; the fall beside it is held to `alpha`."""
FEWEST = 10
"""Samples below which ranks say nothing at any level in use."""


def judge(
    history: Sequence[Measurement], rules: WatchRules, weights: Mapping[str, float]
) -> dict[str, str]:
    """The alarms that the last of `history` raises: a sentence by rule, none where all is well.

    `weights` are by name those of the trained rewards, where one of negative weight rises by
    falling, and of the rankers, which have no series.
    """
    now = history[-1]
    alarms: dict[str, str] = {}
    if rules.held_out_fall is not None:
        for name in (n for n in now.values if n.startswith("held_out/")):
            found = _held_out(history, name, rules.held_out_fall, rules.alpha, weights)
            alarms |= {name: found} if found else {}
    if rules.agreement is not None:
        found = _disagreement(history, rules.agreement, rules.alpha, weights)
        alarms |= {"agreement": found} if found else {}
    for name, threshold in (
        ("diversity", rules.diversity),
        ("high_frequency", rules.high_frequency),
        ("motion", rules.motion),
        ("drift", rules.drift),
    ):
        if threshold is None or name not in now.values:
            continue
        start = alike(history, name)[0]
        if start is now:
            continue
        if name == "diversity":
            found = _diversity(now, start, threshold, rules.alpha)
        else:
            found = _outside(name, now, start, threshold, rules.alpha)
        alarms |= {name: found} if found else {}
    return alarms


def above_zero(values: Array, alpha: float, clusters: Clusters = None) -> bool:
    """Whether the mean of (n,) values exceeds 0 at level `alpha`, by a one-sided t test.

    Where all clusters are equal there is no spread to go by; the sign test then needs 2^−n ≤ alpha,
    n the number of clusters.
    """
    n, mean = len(values), float(values.mean())
    if n < 2 or mean <= 0:
        return False
    error, freedom = standard_error(values, clusters)
    if error <= rounding(values):
        return 2.0 ** -(freedom + 1) <= alpha
    return float(scipy.stats.t.sf(mean / error, freedom)) < alpha


def _held_out(
    history: Sequence[Measurement],
    name: str,
    share: float,
    alpha: float,
    weights: Mapping[str, float],
) -> str | None:
    """A held-out reward fell from its highest mean by more than `share` of its gain.

    The highest of k means is high by luck, too, hence level alpha / k. A trained reward must have
    risen meanwhile. Where something else is trained on, whose rise nothing shows (a ranker's), the
    fall stands alone.
    """
    *earlier, now = alike(history, name)
    if not earlier:
        return None
    start = earlier[0]
    best = max(earlier, key=lambda m: m.mean(name))
    gain = best.values[name] - start.values[name]
    fall = best.values[name] - now.values[name]
    if not above_zero(fall - share * gain, alpha / len(earlier), now.clusters(fall)):
        return None
    risen = [n for n, weight in weights.items() if _risen(history, best, f"trained/{n}", weight)]
    unseen = [n for n in weights if f"trained/{n}" not in now.values]
    if weights and not risen and not unseen:
        return None
    error, _ = standard_error(fall, now.clusters(fall))
    if risen:
        meanwhile = f", while the trained {' and '.join(risen)} rose"
    else:
        meanwhile = f"; {' and '.join(unseen)} ranks images: no scores show a rise" * bool(unseen)
    return (
        f"the held-out {name.partition('/')[2]} fell by {fall.mean():.4g} (standard error "
        f"{error:.2g}) since step {best.step}, where its gain was {gain.mean():.4g}" + meanwhile
    )


def _disagreement(
    history: Sequence[Measurement], threshold: float, alpha: float, weights: Mapping[str, float]
) -> str | None:
    """What the trained rewards gained since the reference is not what a held-out reward sees.

    The changes of the trained rewards (weighted, each in its standard deviations at the reference)
    rose by Wilcoxon's signed-rank test, and their rank correlation with the changes of every
    held-out reward (of which at least half the samples changed) is below the threshold, by Fisher's
    z with the variance of Fieller, Hartley and Pearson (1957). Ranks, because early in a run most
    samples hardly change and a few change much. Samples of one prompt are one, by their mean.
    """
    now, start = history[-1], _common_start(history)
    rise = _weighted_change(now, start, weights)
    trained = None if rise is None else cluster_means(rise, now.clusters(rise))
    if trained is None or len(trained) < FEWEST or np.ptp(trained) == 0:
        return None
    if not scipy.stats.wilcoxon(trained, alternative="greater").pvalue < alpha:
        return None
    spread = math.sqrt(1.06 / (len(trained) - 3))
    limit = math.atanh(threshold) + scipy.stats.norm.ppf(alpha) * spread
    found = {}
    for name in (n for n in now.values if n.startswith("held_out/") and n in start.values):
        change = now.values[name] - start.values[name]
        seen = cluster_means(change, now.clusters(change))
        if np.mean(change != 0) < 0.5 or np.ptp(seen) == 0:
            continue  # a count or a yes and no, which has few changes: its ranks are mostly ties
        found[name.partition("/")[2]] = float(scipy.stats.spearmanr(trained, seen).statistic)
    if not found or any(r >= math.tanh(limit) for r in found.values()):
        return None
    each = ", ".join(f"{r:.2f} with {name}" for name, r in found.items())
    return (
        f"the trained rewards rose since step {start.step}, but not on the samples where the "
        f"held-out ones did: rank correlation {each} (the limit is {threshold:g})"
    )


def _common_start(history: Sequence[Measurement]) -> Measurement:
    """The first measurement, or, where rewards have been measured otherwise since, the first of
    which the last one's changes are all of one measure."""
    found = list(history)
    for name in history[-1].values:
        groups = stretches(history, name) if name.startswith(("trained/", "held_out/")) else []
        if len(groups) > 1:
            steps = {m.step for m in groups[-1]}
            found = [m for m in found if m.step in steps]
    return found[0]


def _weighted_change(
    now: Measurement, start: Measurement, weights: Mapping[str, float]
) -> Array | None:
    """Σ weight × change / standard deviation at `start`, over the trained rewards: (n,), or None
    if nothing changed."""
    total: Array | None = None
    for name, weight in weights.items():
        key = f"trained/{name}"
        if key not in now.values or key not in start.values:
            continue
        scale = float(start.values[key].std()) or 1.0
        part = weight * (now.values[key] - start.values[key]) / scale
        total = part if total is None else total + part
    return total if total is not None and bool(total.any()) else None


def _risen(history: Sequence[Measurement], then: Measurement, name: str, weight: float) -> bool:
    now = history[-1]
    if name not in now.values or then.step not in {m.step for m in alike(history, name)}:
        return False
    rise = math.copysign(1.0, weight) * (now.values[name] - then.values[name])
    return above_zero(rise, RISING, now.clusters(rise))


def _diversity(now: Measurement, start: Measurement, share: float, alpha: float) -> str | None:
    before, after = start.values["diversity"], now.values["diversity"]
    if not above_zero(share * before - after, alpha, now.clusters(after)):
        return None
    return (
        f"diversity is {after.mean():.4g}, {after.mean() / before.mean():.2f} of the "
        f"{before.mean():.4g} at step {start.step} (the limit is {share:g})"
    )


WORDS = {
    "high_frequency": ("high-frequency energy", "a grid or noise", "blur or flat images"),
    "motion": ("motion between frames", "flicker", "still pictures"),
    "drift": ("teacher's velocity gap", "images it would not make", "collapsed or flat images"),
}


def _outside(
    name: str, now: Measurement, start: Measurement, factor: float, alpha: float
) -> str | None:
    """Outside the band around the teacher's value and the reference's, on the same side of both.

    A few-step generator may begin off the teacher's value; that alone, or coming nearer, is no
    alarm.
    """
    after, margin = now.values[name], math.log(factor)
    teacher = start.values.get(TEACHER + name)
    gaps = [after - start.values[name]]
    if teacher is not None:
        gaps.append(after[: len(teacher)] - teacher)
    what, *causes = WORDS[name]
    for word, sign, cause in (("above", 1, causes[0]), ("below", -1, causes[1])):
        if all(above_zero(sign * gap - margin, alpha, now.clusters(gap)) for gap in gaps):
            ratios = [f"{math.exp(gap.mean()):.2f}" for gap in gaps]
            against = f"{ratios[0]} times that at step {start.step}"
            if teacher is not None:
                against += f" and {ratios[1]} times that of the teacher's own samples"
            limit = f"the limit is a factor of {factor:g} {word} both"
            return f"the {what} is {against} ({limit}; {cause})"
    return None
