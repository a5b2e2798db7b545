"""Charts of several lines in one frame, with intervals, limits and marks; the template draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltflow.evaluation.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Tick,
    axis_title,
    frame,
    metric_series,
    number,
    running_median,
    smoothing_window,
    tick_label,
    ticks,
)

STYLES = 6
"""Colours that the template knows; a seventh line has the first's."""
LEGEND = 18.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values (n,) over training steps (n,), with an interval where `low` and `high` are given."""

    name: str
    steps: Array
    values: Array
    low: Array | None = None
    high: Array | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    """A drawn series: `points` and the interval's outline `band` (may be empty) are SVG points."""

    name: str
    style: int
    dashed: bool
    points: str
    band: str
    legend_y: float
    last: str


@dataclass(frozen=True)
class Chart:
    """One frame. `limits` are horizontal lines, `marks` vertical ones; `label` says it in words."""

    title: str
    axis: str
    label: str
    height: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    limits: tuple[Tick, ...]
    marks: tuple[Tick, ...]


@dataclass(frozen=True)
class Scale:
    """From steps in [first, last] and values in [low, high] to places in the frame."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: Array | float) -> Array:
        share = (np.asarray(step) - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: Array | float) -> Array:
        share = (np.clip(value, self.low, self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def points(self, at: Array, value: Array) -> str:
        """As SVG points."""
        pairs = zip(self.x(at), self.y(value), strict=True)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs)

    def line(self, k: int, s: Series) -> Line:
        """The drawn form of the k-th series."""
        band = ""
        if s.low is not None and s.high is not None:
            band = self.points(np.append(s.steps, s.steps[::-1]), np.append(s.low, s.high[::-1]))
        return Line(
            s.name,
            k % STYLES,
            s.dashed,
            self.points(s.steps, s.values),
            band,
            HEIGHT + k * LEGEND,
            number(float(s.values[-1])),
        )


def chart(
    title: str,
    axis: str,
    series: Sequence[Series],
    limits: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Lines over common axes. `limits` are (value, what it is), `marks` (step, what happened).

    Raises:
        ValueError: if there is no point to draw.
    """
    shown = [_thinned(s) for s in series if len(s.steps)]
    if not shown:
        raise ValueError(f"the chart {title!r} has no points")
    steps = np.concatenate([s.steps for s in shown])
    edges = [e for s in shown for e in (s.low, s.high) if e is not None]
    values = np.concatenate([*(s.values for s in shown), *edges])
    low, high = frame(values)
    pad = 0.05 * (high - low)
    low = min([low, *(value - pad for value, _ in limits)])
    high = max([high, *(value + pad for value, _ in limits)])
    first, last = float(steps.min()), float(steps.max())
    last = last if last > first else first + 1

    scale = Scale(first, last, low, high)
    lines = [scale.line(k, s) for k, s in enumerate(shown)]
    return Chart(
        title=title,
        axis=axis,
        label=_words(title, shown, limits, marks),
        height=HEIGHT + len(lines) * LEGEND,
        x_ticks=tuple(Tick(float(scale.x(t)), f"{t:,.0f}") for t in ticks(first, last)),
        y_ticks=tuple(Tick(float(scale.y(t)), tick_label(t, high - low)) for t in ticks(low, high)),
        lines=tuple(lines),
        limits=tuple(Tick(float(scale.y(value)), text) for value, text in limits),
        marks=tuple(Tick(float(scale.x(step)), text) for step, text in marks),
    )


def side_by_side(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """One chart for every metric that two or more runs have, a line a run; long series smoothed."""
    series = {run: metric_series(rows) for run, rows in runs.items()}
    charts = []
    for name in dict.fromkeys(name for found in series.values() for name in found):
        lines = [
            Series(run, found[name][:, 0], _smooth(found[name][:, 1]))
            for run, found in series.items()
            if name in found and len(found[name]) > 1
        ]
        if len(lines) > 1 and any(np.ptp(line.values) > 0 for line in lines):
            charts.append(chart(name, axis_title(name), lines))
    return charts


def _smooth(values: Array) -> Array:
    window = smoothing_window(len(values))
    return running_median(values, window) if window > 1 else values


def _thinned(series: Series) -> Series:
    """Long series averaged down to at most `MOST_POINTS` points."""
    each = -(-len(series.steps) // MOST_POINTS)
    if each == 1 or series.low is not None:
        return series
    cuts = range(0, len(series.steps), each)
    steps, values = (
        np.array([column[i : i + each].mean() for i in cuts])
        for column in (series.steps, series.values)
    )
    return Series(series.name, steps, values, dashed=series.dashed)


def _words(
    title: str,
    series: Sequence[Series],
    limits: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]],
) -> str:
    """The chart for those who cannot see it."""
    runs = "; ".join(
        f"{s.name} from {number(float(s.values[0]))} to {number(float(s.values[-1]))}"
        for s in series
    )
    text = f"{title} over training: {runs}"
    if limits:
        text += "; limits " + " and ".join(number(value) for value, _ in limits)
    for step, what in marks:
        text += f"; {what} at step {step:,.0f}"
    return text
