"""What the watch has seen: `watch.jsonl`, one line a measurement, a value for every sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiltflow.core.disk import write_whole
from tiltflow.core.metrics import read_metrics
from tiltflow.evaluation.statistics import Clusters

Array = NDArray[np.float64]
FILE = "watch.jsonl"
LOGARITHMS = ("high_frequency", "motion", "drift")
"""Series of natural logarithms, which the first line also has of the teacher's own samples."""
TEACHER = "teacher/"
"""The prefix of these."""


@dataclass(frozen=True)
class Measurement:
    """What was measured after `step` iterations: values (n,) by name, and the alarms it raised.

    Names: `held_out/REWARD`, `trained/REWARD`, `diversity`, and `drift`, `high_frequency` and, of
    videos, `motion` (`LOGARITHMS`). `alarms` are sentences by rule. `prompts`: the number of each
    sample's prompt where some are of one, else empty; a series of n values is of the first n
    samples. `digests`: by series, of all that its values depend on beside the generator
    (`setup.watch_facts`); the teacher's samples go with the series that they are held against.
    Earlier versions kept none.
    """

    step: int
    values: Mapping[str, Array]
    alarms: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[int, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not self.alarms

    def mean(self, name: str) -> float:
        return float(self.values[name].mean())

    def digest(self, name: str) -> str | None:
        return self.digests.get(name.removeprefix(TEACHER))

    def clusters(self, values: Array) -> Clusters:
        """The prompts that a series is of, as `evaluation.statistics` takes them."""
        return self.prompts[: len(values)] or None


def read_history(path: Path) -> list[Measurement]:
    """The measurements of a `watch.jsonl`, oldest first; none where there is no file.

    A torn last line, of a run that was killed, is left out.

    Raises:
        ValueError: if another line is not a measurement.
    """
    if not path.is_file():
        return []
    found = []
    for row in read_metrics(path):
        try:
            values = {k: np.asarray(v, dtype=np.float64) for k, v in row["values"].items()}
            if not all(v.ndim == 1 and len(v) and np.isfinite(v).all() for v in values.values()):
                raise ValueError("a series is a list of numbers")
            prompts = tuple(row.get("prompts", ()))
            whole = not prompts or len(prompts) >= max(map(len, values.values()), default=0)
            if not whole or not all(type(number) is int for number in prompts):
                raise ValueError("every sample has a prompt")
            digests = dict(row.get("digests", {}))
            if not all(type(digest) is str for digest in digests.values()):
                raise ValueError("a digest is text")
            found.append(Measurement(row["step"], values, dict(row["alarms"]), prompts, digests))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: step {row['step']} is no measurement") from error
    return found


def stretches(history: Sequence[Measurement], name: str) -> list[list[Measurement]]:
    """The measurements that have a series, in groups that can be held against each other: those of
    one digest, oldest first, the group of the last measurement at the end.

    One without a digest, of an earlier version, goes with the next that has one: what a run goes on
    with after an upgrade is taken as what it began with.
    """
    groups: dict[str | None, list[Measurement]] = {}
    digest: str | None = None
    for seen in reversed([m for m in history if name in m.values]):
        digest = seen.digest(name) or digest
        groups.setdefault(digest, []).insert(0, seen)
    return list(groups.values())[::-1]


def alike(history: Sequence[Measurement], name: str) -> list[Measurement]:
    """Of a series, what the last measurement that has it can be held against, and this itself; the
    first is the reference."""
    return next(iter(stretches(history, name)[::-1]), [])


def anew(history: Sequence[Measurement], digests: Mapping[str, str]) -> list[str]:
    """The series that were measured before, and never as these `digests` have it."""
    found = []
    for name in digests:
        seen = [m for m in history if name in m.values]
        if seen and seen[-1].digest(name) and all(m.digest(name) != digests[name] for m in seen):
            found.append(name)
    return found


class History:
    """The measurements of a run, in memory and on disk; those after `resume_step` are dropped,
    on disk with the next one that is added: a run that is refused leaves the file as it was.

    Of several processes with the same history, one has `write`.

    Numbers go to the file with all their digits, so a resumed run judges as an uninterrupted one.
    """

    def __init__(self, path: Path, resume_step: int, write: bool = True) -> None:
        self.path, self.write = path, write
        self.rows = [m for m in read_history(path) if m.step <= resume_step]

    def check(self, measurement: Measurement) -> None:
        """
        Raises:
            ValueError: if a series has another number of samples than what it is held against.
        """
        for name, values in measurement.values.items():
            before = alike([*self.rows, measurement], name)[0]
            if len(before.values[name]) != len(values):
                raise ValueError(
                    f"{self.path} has {len(before.values[name])} samples of {name}, the watch now "
                    f"measures {len(values)}: resume with the watch's settings as they were"
                )

    def add(self, measurement: Measurement) -> None:
        """Appends a measurement (and replaces one of the same step).

        Raises:
            ValueError: as `check`.
        """
        self.check(measurement)
        self.rows = [m for m in self.rows if m.step < measurement.step] + [measurement]
        self._rewrite()

    def _rewrite(self) -> None:
        """The whole file in one step: it is small, and a kill cannot tear it."""
        if not self.write or (not self.rows and not self.path.exists()):
            return
        write_whole(self.path, "".join(_line(m) for m in self.rows))


def _line(measurement: Measurement) -> str:
    values = {name: array.tolist() for name, array in measurement.values.items()}
    row = {"step": measurement.step, "alarms": dict(measurement.alarms), "values": values}
    row |= {"prompts": list(measurement.prompts)} if measurement.prompts else {}
    row |= {"digests": dict(measurement.digests)} if measurement.digests else {}
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
