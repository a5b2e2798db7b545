"""The watch of a run: measures, judges, remembers (docs/watch.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from tiltflow.evaluation.watch.history import LOGARITHMS, TEACHER, History, Measurement, first_with
from tiltflow.evaluation.watch.rules import judge
from tiltflow.evaluation.watch.settings import WatchRules

Measure = Callable[[int, bool], Measurement]
"""(step, whether to measure the teacher's samples too) → what was measured."""


class Watch:
    """Its whole memory is `history`, so it resumes exactly.

    `weights` are the trained rewards' and rankers' by name.
    """

    def __init__(
        self, measure: Measure, rules: WatchRules, weights: Mapping[str, float], history: History
    ) -> None:
        self.measure, self.rules, self.weights, self.history = measure, rules, weights, history

    def __call__(self, step: int) -> Measurement:
        """Measures after `step` iterations; the first measurement of a run is the reference."""
        rows = [m for m in self.history.rows if m.step < step]
        seen = self.measure(step, not rows)
        judged = replace(seen, alarms=judge([*rows, seen], self.rules, self.weights))
        self.history.add(judged)
        return judged

    @property
    def good(self) -> int | None:
        """The step of the last measurement that raised no alarm; None before the first."""
        clean = [m.step for m in self.history.rows if m.clean]
        return clean[-1] if clean else None

    @property
    def alarmed(self) -> bool:
        """Whether the last measurement raised an alarm."""
        return bool(self.history.rows) and not self.history.rows[-1].clean

    def metrics(self, seen: Measurement) -> dict[str, float]:
        """A measurement as figures for the log: means, and `LOGARITHMS` as ratios to the teacher's
        own samples (of geometric means)."""
        found = {}
        for name, values in seen.values.items():
            if name.startswith("held_out/"):
                found[name] = float(values.mean())
            elif name not in LOGARITHMS and not name.startswith(TEACHER):
                found[f"watch/{name}"] = float(values.mean())
        for name in (n for n in LOGARITHMS if n in seen.values):
            reference = first_with(self.history.rows, TEACHER + name)
            if reference is not None:
                teacher = reference.values[TEACHER + name]
                gap = seen.values[name][: len(teacher)] - teacher
                found[f"watch/{name}"] = math.exp(float(gap.mean()))
        return found | {"watch/alarms": float(len(seen.alarms))}
