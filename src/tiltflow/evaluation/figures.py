"""What the report's figures show: which numbers, in which order, frame and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltflow.core.metrics import set_apart

SMOOTHED_FROM = 40  # points; shorter curves are drawn as they are
MOST_POINTS = 600  # a curve; longer ones are averaged down, or the page grows with the run
SPIKE = 3.0  # a frame is cut where its outermost 4% of points would more than triple its height

# What a metric's values are, with their units; the rest are named after their key.
_METRICS = {
    "fake_score/ambient": "fake-score loss (no unit)",
    "fake_score/consistency": "consistency term (no unit)",
    "generator/matching": "matching gap (no unit)",
    "generator/reward_loss": "reward loss (no unit)",
    "policy/kl": "KL to the start (no unit)",
    "loss": "loss (no unit)",
    "seconds": "time (s)",
    "seconds_per_step": "time a step (s)",
    "lr": "learning rate (no unit)",
    "grad_norm": "gradient norm (no unit)",
    "watch/diversity": "diversity (no unit)",
    "watch/drift": "velocity gap (ratio)",
    "watch/high_frequency": "high frequencies (ratio)",
    "watch/motion": "motion (ratio)",
}


def number(value: float, digits: int | None = None) -> str:
    """A figure for readers, with a true minus sign: `digits` after the point, or else three
    significant ones, and an exponent only where it is tiny or huge."""
    size = abs(value)
    if digits is not None:
        text = f"{value:.{digits}f}"
    elif size == 0:
        text = "0"
    elif size < 1e-4 or size >= 1e6:
        text = f"{value:.2e}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−")


def around(mean: float, interval: Sequence[float], digits: int, sign: str = "±") -> str:
    """What stands behind a mean: "±" and half its interval, or, where the interval is not centred
    on the mean to a tenth of that half (a share near 0 or 1), the interval's ends in brackets."""
    low, high = interval
    half = (high - low) / 2
    if abs(low + high - 2 * mean) <= 0.2 * half:
        return sign + f"{half:.{digits}f}"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def elided(text: str, most: int) -> str:
    """A text of at most so many letters: what is left out of its middle is a mark. Names of runs
    differ at their ends as a rule."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def decimals(intervals: Sequence[Sequence[float]]) -> int:
    """The digits after the point that intervals (low, high) warrant: two of the narrowest's half
    width, 0 to 6; three where no interval has a width."""
    halves = [(high - low) / 2 for low, high in intervals if high > low]
    return min(max(1 - math.floor(math.log10(min(halves))), 0), 6) if halves else 3


def metric_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """(n, 2) steps and values of every numeric metric, rewards first, then losses. What the log
    says is measured otherwise from a step on is two.

    Raises:
        ValueError: if a row has no numeric `step`.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = row.get("step")
        if not _numeric(step):
            raise ValueError("a row of the metrics has no step")
        set_apart(series, row)
        for name, value in row.items():
            if name != "step" and _numeric(value):
                series.setdefault(name, []).append((float(step), float(value)))  # type: ignore[arg-type]
    return {
        name: np.array(sorted(series[name], key=lambda point: point[0]))
        for name in sorted(series, key=_order)
    }


def axis_title(name: str) -> str:
    """What a metric's axis shows, with its unit."""
    group, _, last = name.rpartition("/")
    if group == "reward" or group.endswith("/reward"):
        return "mean reward (no unit)"
    if group in ("held_out", "watch/trained"):
        return f"mean {group.rpartition('/')[2].replace('_', '-')} reward (no unit)"
    return _METRICS.get(name) or _METRICS.get(last) or last.replace("_", " ")


def _order(name: str) -> tuple[int, str]:
    """Rewards first, then losses and gaps, then the rest."""
    group, _, last = name.rpartition("/")
    rewards = "reward" in group or group in ("held_out", "watch/trained")
    first = 0 if rewards else 1 if name in _METRICS or "loss" in last else 2
    return first, name


def _numeric(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def frame(values: NDArray[np.float64]) -> tuple[float, float]:
    """The lowest and highest value drawn: all of them, unless a few spikes would hide the rest."""
    low, high = float(values.min()), float(values.max())
    calm_low, calm_high = (float(q) for q in np.quantile(values, (0.02, 0.98)))
    calm = calm_high - calm_low
    if high - low > SPIKE * calm > 0:
        low, high = max(low, calm_low - calm / 2), min(high, calm_high + calm / 2)
    pad = 0.05 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - pad, high + pad


def smoothing_window(points: int) -> int:
    """The points that a drawn running median is over; 1 for short curves, drawn as they are."""
    return max(1, points // 20) if points >= SMOOTHED_FROM else 1


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median of the `smoothing_window` around each point, fewer at the ends."""
    window = smoothing_window(len(values))
    starts = range(-(window // 2), len(values) - window // 2)
    return np.array([np.median(values[max(i, 0) : i + window]) for i in starts])


def thinned(points: NDArray[np.float64]) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """How many of the points (n, 2) are averaged to one, and the steps and values of those that
    are drawn, at most `MOST_POINTS`."""
    each = math.ceil(len(points) / MOST_POINTS)
    steps, values = np.array([points[i : i + each].mean(0) for i in range(0, len(points), each)]).T
    return each, steps, values
