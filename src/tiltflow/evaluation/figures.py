"""The geometry of the report's figures: numbers in, SVG coordinates out; the template draws.

Coordinates are in units of an SVG view box, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 84.0, 12.0, 12.0, 44.0  # left of the frame: nine figures and a title
FOREST_LEFT, FOREST_RIGHT, ROW = 16.0, 20.0, 42.0
SMOOTHED_FROM = 40  # points; shorter curves are drawn as they are
MOST_POINTS = 600  # a curve; longer ones are averaged down, or the page grows with the run
SPIKE = 3.0  # a frame is cut where its outermost 4% of points would more than triple its height

# What a metric's values are, with their units; the rest are named after their key.
_METRICS = {
    "fake_score/ambient": "fake-score loss (no unit)",
    "fake_score/consistency": "consistency term (no unit)",
    "generator/matching": "matching gap (no unit)",
    "generator/reward_loss": "reward loss (no unit)",
    "policy/kl": "KL to the start (nats)",
    "loss": "loss (no unit)",
    "seconds": "time (s)",
    "seconds_per_step": "time a step (s)",
    "lr": "learning rate (no unit)",
    "grad_norm": "gradient norm (no unit)",
    "watch/diversity": "diversity (no unit)",
    "watch/drift": "velocity gap (ratio)",
    "watch/high_frequency": "high frequencies (ratio)",
}


@dataclass(frozen=True)
class Tick:
    """A tick's place along its axis, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A metric over training: `raw` and `smooth` are SVG polyline points (`smooth` may be empty).

    `outside` counts the points beyond the frame, `each` the lines of the metrics that a point is
    the mean of, `window` the points that `smooth` is the running median of.
    """

    name: str
    axis: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    raw: str
    smooth: str
    outside: int
    each: int
    window: int
    first: str
    last: str


@dataclass(frozen=True)
class Interval:
    """A system's mean and interval: a dot and a bar at height `y`."""

    system: str
    y: float
    mean: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Forest:
    """The intervals of all systems under one reward, in one frame."""

    reward: str
    height: float
    ticks: tuple[Tick, ...]
    rows: tuple[Interval, ...]


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


def decimals(intervals: Sequence[Sequence[float]]) -> int:
    """The digits after the point that intervals (low, high) warrant: two of the narrowest's half
    width, 0 to 6; three where no interval has a width."""
    halves = [(high - low) / 2 for low, high in intervals if high > low]
    return min(max(1 - math.floor(math.log10(min(halves))), 0), 6) if halves else 3


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """One curve for every numeric metric with two or more points that differ.

    Raises:
        ValueError: if a row has no numeric `step`.
    """
    return [
        _curve(name, points)
        for name, points in metric_series(rows).items()
        if len(points) > 1 and np.ptp(points[:, 0]) > 0 and np.ptp(points[:, 1]) > 0
    ]


def metric_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """(n, 2) steps and values of every numeric metric, rewards first, then losses.

    Raises:
        ValueError: if a row has no numeric `step`.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = row.get("step")
        if not _numeric(step):
            raise ValueError("a row of the metrics has no step")
        for name, value in row.items():
            if name != "step" and _numeric(value):
                series.setdefault(name, []).append((float(step), float(value)))  # type: ignore[arg-type]
    return {
        name: np.array(sorted(series[name], key=lambda point: point[0]))
        for name in sorted(series, key=_order)
    }


def forests(evaluation: Mapping[str, Any]) -> list[Forest]:
    """One figure for every reward of an `evaluation.json`, rewards in their first order."""
    systems = evaluation["systems"]
    rewards = dict.fromkeys(r for s in systems.values() for r in s["scores"])
    return [_forest(reward, systems) for reward in rewards]


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


def _curve(name: str, points: NDArray[np.float64]) -> Curve:
    each = math.ceil(len(points) / MOST_POINTS)
    cuts = range(0, len(points), each)
    steps, values = np.array([points[i : i + each].mean(0) for i in cuts]).T
    window = smoothing_window(len(values))
    low, high = frame(values)

    def x(step: NDArray[np.float64] | float) -> Any:
        return LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: NDArray[np.float64] | float) -> Any:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def line(ys: NDArray[np.float64]) -> str:
        shown = np.clip(ys, low, high)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(steps), y(shown), strict=True))

    return Curve(
        name=name,
        axis=axis_title(name),
        x_ticks=tuple(Tick(float(x(t)), f"{t:,.0f}") for t in ticks(steps[0], steps[-1])),
        y_ticks=tuple(Tick(float(y(t)), tick_label(t, high - low)) for t in ticks(low, high)),
        raw=line(values),
        smooth=line(running_median(values, window)) if window > 1 else "",
        outside=int(((values > high) | (values < low)).sum()),
        each=each,
        window=window,
        first=number(float(np.median(values[:window]))),
        last=number(float(np.median(values[-window:]))),
    )


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


def running_median(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The median of `window` points around each, fewer at the ends."""
    starts = range(-(window // 2), len(values) - window // 2)
    return np.array([np.median(values[max(i, 0) : i + window]) for i in starts])


def tick_label(value: float, span: float) -> str:
    """A tick's label, with the digits that tell its neighbours apart."""
    if value == 0:
        return "0"
    if span < 1e-4 or abs(value) >= 1e6:
        return f"{value:.1e}".replace("-", "−")
    digits = max(0, 1 - math.floor(math.log10(span)))
    text = f"{value:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _forest(reward: str, systems: Mapping[str, Any]) -> Forest:
    found = [(n, s["scores"][reward]) for n, s in systems.items() if reward in s["scores"]]
    low = min(min(v["ci95"][0], v["mean"]) for _, v in found)
    high = max(max(v["ci95"][1], v["mean"]) for _, v in found)
    pad = 0.08 * (high - low) or max(abs(high), 1.0) * 0.1
    low, high = low - pad, high + pad
    span = WIDTH - FOREST_LEFT - FOREST_RIGHT

    def x(value: float) -> float:
        return float(FOREST_LEFT + (value - low) / (high - low) * span)

    rows = tuple(
        Interval(
            system=name,
            y=TOP + (k + 0.5) * ROW,
            mean=x(score["mean"]),
            low=x(score["ci95"][0]),
            high=x(score["ci95"][1]),
            text=number(score["mean"]),
        )
        for k, (name, score) in enumerate(found)
    )
    marks = tuple(Tick(x(t), tick_label(t, high - low)) for t in ticks(low, high))
    return Forest(reward, TOP + len(rows) * ROW + BOTTOM, marks, rows)
