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
LOGARITHMS = ("high_frequency", "drift")
"""Series of natural logarithms, which the first line also has of the teacher's own samples."""
TEACHER = "teacher/"
"""The prefix of these."""


@dataclass(frozen=True)
class Measurement:
    """What was measured after `step` iterations: values (n,) by name, and the alarms it raised.

    Names: `held_out/REWARD`, `trained/REWARD`, `diversity`, and `drift` and `high_frequency`
    (`LOGARITHMS`). The samples are the same in every measurement of a run. `alarms` are sentences
    by rule. `prompts`: the number of each sample's prompt where some are of one, else empty; a
    series of n values is of the first n samples.
    """

    step: int
    values: Mapping[str, Array]
    alarms: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[int, ...] = ()

    @property
    def clean(self) -> bool:
        return not self.alarms

    def mean(self, name: str) -> float:
        return float(self.values[name].mean())

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
            found.append(Measurement(row["step"], values, dict(row["alarms"]), prompts))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: step {row['step']} is no measurement") from error
    return found


def first_with(history: Sequence[Measurement], name: str) -> Measurement | None:
    """The reference of a series: the first measurement that has it."""
    return next((m for m in history if name in m.values), None)


class History:
    """The measurements of a run, in memory and on disk; those after `resume_step` are dropped,
    on disk with the next one that is added: a run that is refused leaves the file as it was.

    Of several processes with the same history, one has `write`.

    Numbers go to the file with all their digits, so a resumed run judges as an uninterrupted one.
    """

    def __init__(self, path: Path, resume_step: int, write: bool = True) -> None:
        self.path, self.write = path, write
        self.rows = [m for m in read_history(path) if m.step <= resume_step]

    def add(self, measurement: Measurement) -> None:
        """Appends a measurement (and replaces one of the same step).

        Raises:
            ValueError: if a series has another number of samples than before.
        """
        for name, values in measurement.values.items():
            before = first_with(self.rows, name)
            if before is not None and len(before.values[name]) != len(values):
                raise ValueError(
                    f"{self.path} has {len(before.values[name])} samples of {name}, the watch now "
                    f"measures {len(values)}: resume with the watch's settings as they were"
                )
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
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
