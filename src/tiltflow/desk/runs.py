"""Training runs as the page shows them: curves that are read as they grow, samples, settings."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tiltflow.config.recipe_source import read_recipe
from tiltflow.core.disk import parse_json
from tiltflow.core.metrics import ANEW, set_apart
from tiltflow.core.run_lock import held_by_another
from tiltflow.evaluation.watch.history import FILE as WATCH
from tiltflow.tasks.evaluate import kept_prompts
from tiltflow.tasks.sheets import prompt_files, sheet_mark, sheets
from tiltflow.tasks.train import COLUMNS
from tiltflow.training.changes import by_key

POINTS = 300
"""Points of a curve that are kept, at least; twice as many at most."""
NOTES = 100
"""Sentences of a log that are kept: the latest."""
TAIL = 65_536
"""Bytes at the end of a log that the list of runs looks at."""
FAR = 64 * TAIL
"""Bytes at its end in which it looks for the watch's last line, where the watch looks seldom."""
MARKS = 4
"""Files whose times say how fast a run is."""
PIECE = 1 << 20
"""Bytes of a log that are read at a time."""
LARGEST = 1e300
"""Of a log's numbers: means of them are finite."""
CHECKPOINT = re.compile(r"step-(\d{6,})")


@dataclass
class Curve:
    """A metric over steps. When it has 2 × `POINTS` points, neighbours become their mean, so that
    a log of any length takes the same memory; `each` are the lines that a point stands for."""

    points: list[tuple[int, float]] = field(default_factory=list)
    each: int = 1
    _sum: float = 0.0
    _count: int = 0
    _last: int = 0

    def add(self, step: int, value: float) -> None:
        self._sum, self._count, self._last = self._sum + value, self._count + 1, step
        if self._count < self.each:
            return
        self.points.append((step, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self.points) >= 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(later, (a + b) / 2) for (_, a), (later, b) in pairs]
            self.each *= 2

    def drawn(self) -> list[tuple[int, float]]:
        """The points, and the mean of the latest lines, which are no whole point yet: a curve ends
        where its log does."""
        rest = [(self._last, self._sum / self._count)] if self._count else []
        return [*self.points, *rest]


class Log:
    """A run's metrics.jsonl: `refresh` reads what has been appended since the last time.

    Several browsers ask at once: whoever reads it, or what it holds, has `lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._read, self._line = 0, b""
        self.step = 0
        self.curves: dict[str, Curve] = {}
        self.notes: list[tuple[int, str, str]] = []
        """(step, name, sentence): alarms, and what was changed when the run went on."""

    def refresh(self) -> None:
        """Begins anew where the line that was read last is not there any more: a run that went on
        from a checkpoint drops the lines after it, and another run may have taken its place. (A
        file's number on the disk does not tell: it is given again as soon as it is free.)"""
        if not self.path.is_file():
            return self._forget()
        with self.path.open("rb") as file:
            file.seek(self._read - len(self._line))
            if file.read(len(self._line)) != self._line:
                self._forget()
            file.seek(self._read)
            rest = b""
            while piece := file.read(PIECE):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._take(line)
                    self._read, self._line = self._read + len(line) + 1, line + b"\n"

    def _take(self, line: bytes) -> None:
        row = _row(line)
        if row is None:
            return
        self.step = max(self.step, row["step"])
        set_apart(self.curves, row)
        for name, value in row.items():
            if isinstance(value, str):
                if name == ANEW:
                    value = f"from here on measured otherwise: {value}"
                self.notes = [*self.notes, (row["step"], name, value)][-NOTES:]
            elif name != "step":
                self.curves.setdefault(name, Curve()).add(row["step"], float(value))


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of a log, None if it is torn or holds something else: a page shows what there is."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(map(_plain, row.values())) else None


def _plain(value: object) -> bool:
    """Whether a page can show it: a text, or a number that is finite and whose sums are."""
    number = isinstance(value, int | float) and abs(value) <= LARGEST  # NaN is not
    return number or isinstance(value, str)


def summary(run: Path) -> dict[str, Any]:
    """A run in the list, from the end of its log: its step, the alarms of the watch's last look,
    whether it goes on."""
    log, step, modified = run / "metrics.jsonl", 0, 0.0
    alarms: int | None = None
    if log.is_file():
        with log.open("rb") as file:
            about = os.fstat(file.fileno())
            file.seek(max(0, about.st_size - TAIL))
            for row in filter(None, map(_row, file.read(TAIL).split(b"\n"))):
                step = max(step, row["step"])
                alarms = _alarms(row, alarms)
            if alarms is None and (run / WATCH).is_file():
                file.seek(max(0, about.st_size - FAR))
                seen = file.read(FAR).rpartition(b'"watch/alarms"')
                line = seen[0].rpartition(b"\n")[2] + seen[1] + seen[2].partition(b"\n")[0]
                alarms = _alarms(_row(line) or {}, None)
        modified = about.st_mtime
    return {
        "step": step,
        "alarms": alarms or 0,
        "modified": modified,
        "running": held_by_another(run),
        "tilt": (run / "export" / "tilt").is_dir(),
    }


def _alarms(row: Mapping[str, Any], before: int | None) -> int | None:
    found = row.get("watch/alarms", before)
    return before if found is None or isinstance(found, str) else int(found)


def sample_file(run: Path, step: int, drawn: str | None = None) -> Path:
    """A sheet's picture.

    Raises:
        KeyError: if there is none, or it is another than the one that was `drawn` (`sheet_mark`):
            a run that went on from before it drew it anew, maybe of other prompts.
    """
    file = sheets(run)[step]
    if drawn is not None and drawn != sheet_mark(file):
        raise KeyError(file.name)
    return file


def _samples(run: Path, chosen: Mapping[str, Any], pictures: Mapping[int, Path]) -> dict[str, Any]:
    """The sheets: their steps, their marks, and for each the number of its list of `prompts`.

    The marks are read first: a sheet that is drawn anew meanwhile has another mark, and so the page
    does not get it under the prompts of the one before.
    """
    marks = [sheet_mark(file) for file in pictures.values()]
    files = {} if chosen.get("model.medium") is not None else prompt_files(run)
    texts = {file: _prompts(file) for file in set(files.values())}
    lists = [texts[files[step]] if step in files else () for step in pictures]
    prompts = list(dict.fromkeys(lists))
    return {
        "samples": list(pictures),
        "drawn": marks,
        "prompts": prompts,
        "captions": [prompts.index(found) for found in lists],
    }


def _prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a sheet's images in reading order; none where they are no text."""
    try:
        return kept_prompts(file)
    except ValueError:
        return ()


def settings(run: Path) -> dict[str, Any]:
    """A run's resolved config by dotted key.

    Raises:
        ValueError: if it is no YAML.
    """
    return by_key(read_recipe(str(run / "config.yaml")))


def view(run: Path, log: Log) -> dict[str, Any]:
    """Everything of a run that the page shows."""
    with log.lock:
        log.refresh()
        return _view(run, log)


def _view(run: Path, log: Log) -> dict[str, Any]:
    chosen = settings(run)
    pictures, total = sheets(run), chosen.get("train.steps")
    running = held_by_another(run)
    pace = _pace(run, pictures, log)
    left = None
    if running and pace is not None and isinstance(total, int):
        left = pace * max(0, total - log.step)
    return {
        "step": log.step,
        "steps": total if isinstance(total, int) else None,
        "stage": _text(chosen.get("stage", "?")),
        "running": running,
        "seconds_per_step": pace,
        "seconds_left": left,
        "curves": {name: curve.drawn() for name, curve in log.curves.items()},
        "notes": log.notes,
        **_samples(run, chosen, pictures),
        "columns": COLUMNS,
        "settings": {name: _text(value) for name, value in chosen.items()},
        "trained": _names(chosen, "rewards."),
        "held_out": _names(chosen, "watch.rewards."),
    }


def _names(chosen: Mapping[str, Any], prefix: str) -> list[str]:
    keys = (key.removeprefix(prefix) for key in chosen if key.startswith(prefix))
    return list(dict.fromkeys(key.rpartition(".")[0] or key for key in keys))


def _pace(run: Path, pictures: Mapping[int, Path], log: Log) -> float | None:
    """Seconds an iteration, from the times of the latest files whose step is known: samples, or
    checkpoints of a run that draws none, and the log. A log has no times in it, so that it is the
    same whoever ran it and when. The (lower) median of the times between them: a run that stood
    still for a night is not a slow one. None before there are two."""
    files = list(pictures.items()) or _checkpoints(run)
    marks = [(step, file.stat().st_mtime) for step, file in files[-MARKS:]]
    if log.path.is_file() and (not marks or log.step > marks[-1][0]):
        marks.append((log.step, log.path.stat().st_mtime))
    between = [(s - r, t - u) for (r, u), (s, t) in pairwise(marks)]
    paces = sorted(time / steps for steps, time in between if time > 0)
    return paces[(len(paces) - 1) // 2] if paces else None


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    folder = run / "checkpoints"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(int(match[1]), file) for file in files if (match := CHECKPOINT.fullmatch(file.name))]


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
