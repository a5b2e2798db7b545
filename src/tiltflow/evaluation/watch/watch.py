"""The watch of a run: measures, judges, remembers (docs/watch.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from tiltflow.evaluation.watch.history import (
    LOGARITHMS,
    TEACHER,
    History,
    Measurement,
    alike,
    anew,
)
from tiltflow.evaluation.watch.rules import judge
from tiltflow.evaluation.watch.settings import WatchRules

Measure = Callable[[int, bool], Measurement]
"""(step, whether to measure the teacher's samples too) → what was measured."""


class Watch:
    """Its whole memory is `history`, so it resumes exactly.

    `weights` are the trained rewards' and rankers' by name, `digests` as a `Measurement`'s.
    """

    def __init__(
        self,
        measure: Measure,
        rules: WatchRules,
        weights: Mapping[str, float],
        history: History,
        digests: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.measure, self.rules, self.weights, self.history = measure, rules, weights, history
        self.digests = digests
        self.renewed: list[str] = []
        """The series of which the last look is a new reference."""

    def __call__(self, step: int) -> Measurement:
        """Measures after `step` iterations; the first measurement of a run is the reference, and
        the first that is made otherwise is that of the series it changes."""
        rows = [m for m in self.history.rows if m.step < step]
        self.renewed = anew(rows, self.digests)
        teacher = not rows or any(name in LOGARITHMS for name in self.renewed)
        seen = self.measure(step, teacher)
        of = {name: digest for name, digest in self.digests.items() if name in seen.values}
        seen = replace(seen, digests=of)
        self.history.check(seen)
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
            if name not in LOGARITHMS and not name.startswith(TEACHER):
                found[self.logged_as(name)] = float(values.mean())
        rows = [*(m for m in self.history.rows if m.step < seen.step), seen]
        for name in (n for n in LOGARITHMS if n in seen.values):
            with_teacher = (m for m in alike(rows, name) if TEACHER + name in m.values)
            reference = next(with_teacher, None)
            if reference is not None:
                teacher = reference.values[TEACHER + name]
                gap = seen.values[name][: len(teacher)] - teacher
                found[self.logged_as(name)] = math.exp(float(gap.mean()))
        return found | {"watch/alarms": float(len(seen.alarms))}

    @staticmethod
    def logged_as(name: str) -> str:
        """What a series is called in the log."""
        return name if name.startswith("held_out/") else f"watch/{name}"
