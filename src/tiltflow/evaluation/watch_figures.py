"""What the watch saw, for the report: held-out against trained rewards, ratios, alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiltflow.evaluation.charts import Chart, Series, chart
from tiltflow.evaluation.statistics import mean_ci
from tiltflow.evaluation.watch.history import LOGARITHMS, TEACHER, Array, Measurement, stretches

Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Watched:
    """A run's looks, the thresholds of its rules by name, and the sentence if an alarm ended it."""

    looks: Sequence[Measurement]
    rules: Mapping[str, Any] = field(default_factory=dict)
    ended: str = ""


@dataclass(frozen=True)
class Alarm:
    """An alarm for the table of alarms."""

    run: str
    step: int
    rule: str
    text: str


def alarms(runs: Mapping[str, Watched]) -> list[Alarm]:
    """Every alarm, by run and step."""
    return [
        Alarm(run, look.step, rule, text)
        for run, watched in runs.items()
        for look in watched.looks
        for rule, text in look.alarms.items()
    ]


def watch_charts(runs: Mapping[str, Watched]) -> list[Chart]:
    """Rewards of each run since its start, then diversity, drift and spectrum of all runs."""
    charts = []
    for run, watched in runs.items():
        lines = _rewards(watched.looks)
        if lines:
            title = "Held-out against trained rewards" + (f", {run}" if len(runs) > 1 else "")
            axis = "change (standard deviations)"
            charts.append(chart(title, axis, lines, [(0.0, "start")], _marks({run: watched})))
    for name, title in (
        ("diversity", "Diversity against the start"),
        ("drift", "Teacher's velocity gap against its own samples'"),
        ("high_frequency", "High-frequency energy against the teacher's"),
        ("motion", "Motion between frames against the teacher's"),
    ):
        lines = [
            _series(run + word, intervals)
            for run, watched in runs.items()
            for word, looks in _parts(watched.looks, name)
            if (intervals := _ratios(looks, name))
        ]
        if lines:
            rules = [w.rules.get(name) for w in runs.values()]
            same = rules[0] if all(r == rules[0] for r in rules) else None
            drawn = _limits(name, float(same), runs) if same else []
            charts.append(chart(title, "ratio (no unit)", lines, drawn, _marks(runs)))
    return charts


def _rewards(looks: Sequence[Measurement]) -> list[Series]:
    """Each reward's change since the first look at it, in that look's standard deviations."""
    names = dict.fromkeys(n for look in looks for n in look.values)
    lines = []
    for group, dashed in (("trained", False), ("held_out", True)):
        for name in (n for n in names if n.startswith(f"{group}/")):
            for word, seen in _parts(looks, name):
                start = seen[0].values[name]
                spread = float(start.std()) or 1.0
                intervals = {
                    look.step: _scaled(_change(look, look.values[name] - start), 1 / spread)
                    for look in seen
                }
                words = f"{name.partition('/')[2]} ({group.replace('_', '-')}){word}"
                lines.append(_series(words, intervals, dashed))
    return lines


def _parts(looks: Sequence[Measurement], name: str) -> list[tuple[str, list[Measurement]]]:
    """The looks at a series, apart where it was measured otherwise: a word for the later ones'
    names, and those of one measure."""
    groups = stretches(looks, name)
    return [(f", anew from step {g[0].step}" * (i > 0), g) for i, g in enumerate(groups)]


def _ratios(looks: Sequence[Measurement], name: str) -> dict[int, Interval]:
    """By step, the ratio to the first mean, or (`LOGARITHMS`) to the teacher's geometric mean, of
    looks that all have the series by one measure."""
    start = looks[0].values.get(TEACHER + name if name in LOGARITHMS else name)
    if start is None or len(start) < 2:  # one sample, of a run that asked for no more: no interval
        return {}
    found: dict[int, Interval] = {}
    for look in looks:
        gap = _change(look, look.values[name][: len(start)] - start)
        if name in LOGARITHMS:
            found[look.step] = (math.exp(gap[0]), math.exp(gap[1]), math.exp(gap[2]))
        else:
            mean = float(start.mean())
            if mean <= 0:
                return {}
            low, middle, high = gap[1] / mean, gap[0] / mean, gap[2] / mean
            found[look.step] = (1 + middle, 1 + low, 1 + high)
    return found


def _change(look: Measurement, differences: Array) -> Interval:
    return mean_ci(differences, clusters=look.clusters(differences))


def _series(name: str, intervals: Mapping[int, Interval], dashed: bool = False) -> Series:
    steps = np.array(list(intervals), dtype=np.float64)
    values, low, high = np.array(list(intervals.values())).T
    return Series(name, steps, values, low, high, dashed)


def _scaled(interval: Interval, factor: float) -> Interval:
    return interval[0] * factor, interval[1] * factor, interval[2] * factor


def _marks(runs: Mapping[str, Watched]) -> list[tuple[float, str]]:
    """The first alarm of each run."""
    marks = []
    for run, watched in runs.items():
        first = next((look.step for look in watched.looks if look.alarms), None)
        if first is not None:
            marks.append((float(first), "first alarm" + (f" of {run}" if len(runs) > 1 else "")))
    return marks


def _limits(name: str, threshold: float, runs: Mapping[str, Watched]) -> list[tuple[float, str]]:
    """The rule's limits: a band reaches from the lower of teacher and start to the higher, and
    `threshold` beyond, so it is drawn for one run only."""
    if name not in LOGARITHMS:
        return [(threshold, f"limit {threshold:g}")]
    parts = [looks for w in runs.values() for _, looks in _parts(w.looks, name)]
    starts = [next(iter(_ratios(looks, name).values()), None) for looks in parts]
    if len(starts) != 1 or starts[0] is None:
        return []
    low, high = min(1.0, starts[0][0]) / threshold, max(1.0, starts[0][0]) * threshold
    return [(low, f"limit {low:.2g}"), (high, f"limit {high:.2g}")]
