"""Evaluations side by side: systems on the same prompts from the same noise, row by row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltflow.desk.sources import Place
from tiltflow.evaluation.files import StoredScores, read_evaluation, read_scores, scores_path
from tiltflow.evaluation.statistics import correct, mean_ci, paired_comparison, verdict

PAGE = 12
"""Prompts of a page of the table."""
NOISE = ("prompts", "seed", "resolution", "max_sequence_length")
"""What two evaluations have in common where their images come from the same noise."""


@dataclass(frozen=True)
class Column:
    """A system: its figures, and where its images lie, if they were kept."""

    name: str
    nfe: int
    scores: Mapping[str, NDArray[np.float64]]
    images: Path
    tilt: float | None
    """The strength of the stage-2 adapter it was sampled with, None where that has no part."""

    def image(self, row: int) -> Path:
        return self.images / f"{row:05d}.png"


@dataclass(frozen=True)
class Table:
    """The systems of one or several evaluations; N prompts with their categories."""

    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    columns: tuple[Column, ...]

    @property
    def rewards(self) -> list[str]:
        return list(dict.fromkeys(r for column in self.columns for r in column.scores))

    def column(self, name: str) -> Column:
        """The system of that name.

        Raises:
            ValueError: if there is none.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise ValueError("there is no such system in this set")


@dataclass(frozen=True)
class Choice:
    """Which rows and systems are looked at. None takes every system, or every category."""

    reward: str
    baseline: str
    systems: tuple[str, ...] | None = None
    category: str | None = None
    differ: bool = False
    """Rows in the order of how far apart the systems' scores are, not of the prompts."""
    page: int = 0


def group(
    evaluations: Mapping[str, Place], problems: list[str] | None = None
) -> dict[str, list[Place]]:
    """Evaluations by what makes them comparable; the key is a digest of that. One that cannot be
    read (any more) is left out, and why is added to `problems`."""
    sets: dict[str, list[Place]] = {}
    for place in evaluations.values():
        try:
            asked = _summary(place.path).get("asked")
        except (OSError, ValueError) as error:
            if problems is not None and not isinstance(error, FileNotFoundError):
                problems.append(f"{place.name}: {error}")
            continue
        same: Any = place.id
        if isinstance(asked, dict):
            several = {"sizes": asked["sizes"]} if "sizes" in asked else {}
            same = {key: asked.get(key) for key in NOISE} | several
        text = json.dumps(same, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        sets.setdefault(key, []).append(place)
    return sets


def load_table(places: Sequence[Place]) -> Table:
    """The systems of comparable evaluations. One with the same scores in all of them (the
    teacher, as a rule) is one column; others are called by their evaluation, too.

    Raises:
        ValueError: if a file of them cannot be read, or their prompts are not the same.
    """
    stored = {place: _scores(place.path) for place in places}
    first = next(iter(stored.values()))
    columns: dict[str, Column] = {}
    for place, found in stored.items():
        if found.prompts != first.prompts:
            raise ValueError(f"{place.name} has other prompts than {places[0].name}")
        summary = _summary(place.path)
        for system, scores in found.scores.items():
            alone = all(_same(scores, other.scores.get(system)) for other in stored.values())
            name = system if alone else f"{system}, {place.name}"
            columns.setdefault(name, _column(name, system, scores, place.path, summary))
    return Table(first.prompts, first.categories, tuple(columns.values()))


def _column(
    name: str,
    system: str,
    scores: Mapping[str, NDArray[np.float64]],
    path: Path,
    summary: Mapping[str, Any],
) -> Column:
    asked = summary.get("asked") or {}
    tilt = asked.get("tilt") if asked.get("tilt_lora") and system == "rtdmd" else None
    nfe = int(summary["systems"].get(system, {}).get("nfe", 0))
    images = path.with_suffix(".images") / system
    first = next(iter(summary.get("sizes", {})), "")  # where a prompt has several, that is shown
    if (images / first).is_dir():
        images = images / first
    return Column(name, nfe, scores, images, tilt)


def _same(
    scores: Mapping[str, NDArray[np.float64]], other: Mapping[str, NDArray[np.float64]] | None
) -> bool:
    """Whether two tables hold the same scores, or the other evaluation has no such system."""
    if other is None:
        return True
    return scores.keys() == other.keys() and all(
        np.array_equal(scores[r], other[r], equal_nan=True) for r in scores
    )


def rows_of(table: Table, choice: Choice) -> NDArray[np.intp]:
    """The rows that a choice shows, in its order.

    Raises:
        ValueError: if a system or the reward is not in the table.
    """
    columns = chosen(table, choice)
    rows = np.arange(len(table.prompts))
    if choice.category is not None:
        rows = np.array([r for r in rows if table.categories[r] == choice.category], dtype=np.intp)
    if choice.differ and len(rows):
        scores = np.stack([_values(c, choice.reward, len(table.prompts))[rows] for c in columns])
        apart = np.where(np.isfinite(scores).all(0), np.ptp(scores, axis=0), -math.inf)
        rows = rows[np.argsort(-apart, kind="stable")]
    return rows


def chosen(table: Table, choice: Choice) -> list[Column]:
    """The columns of a choice, in the table's order.

    Raises:
        ValueError: if one of them, the baseline or the reward is not in the table.
    """
    if choice.reward not in table.rewards:
        raise ValueError("there is no such reward in this set")
    table.column(choice.baseline)
    if choice.systems is None:
        return list(table.columns)
    picked = [table.column(name) for name in choice.systems]
    return [column for column in table.columns if column in picked]


def look(table: Table, choice: Choice) -> dict[str, Any]:
    """A page of rows, and for each column its mean and its paired difference to the baseline
    over all rows of the choice, with 95% intervals and a verdict, whose p-value is corrected for
    the number of columns (`evaluation/statistics.py`)."""
    rows = rows_of(table, choice)
    page = rows[choice.page * PAGE : (choice.page + 1) * PAGE]
    base = _values(table.column(choice.baseline), choice.reward, len(table.prompts))[rows]
    columns = chosen(table, choice)
    figures = [_figures(column, choice, base, rows, table.prompts) for column in columns]
    compared = [found["difference"] for found in figures if found["difference"]]
    correct(compared)
    for found in compared:
        found["verdict"] = verdict(found)
    return {
        "columns": figures,
        "rows": [
            {
                "row": int(row),
                "prompt": table.prompts[row],
                "category": table.categories[row],
                "scores": {c.name: _at(c, choice.reward, int(row)) for c in columns},
                "images": [c.name for c in columns if c.image(int(row)).is_file()],
            }
            for row in page
        ],
        "count": len(rows),
        "pages": -(-len(rows) // PAGE),
    }


def _figures(
    column: Column,
    choice: Choice,
    base: NDArray[np.float64],
    rows: NDArray[np.intp],
    prompts: Sequence[str],
) -> dict[str, Any]:
    values = _values(column, choice.reward, len(prompts))[rows]
    texts = [prompts[row] for row in rows]
    found: dict[str, Any] = {
        "name": column.name,
        "nfe": column.nfe,
        "mean": None,
        "difference": None,
    }
    if len(values) > 1 and bool(np.isfinite(values).all()):
        mean, low, high = mean_ci(values, clusters=texts)
        found["mean"] = {"value": mean, "ci95": [low, high]}
        if column.name != choice.baseline and bool(np.isfinite(base).all()):
            paired = paired_comparison(values, base, texts)
            found["difference"] = {
                "difference": paired.difference,
                "ci95": list(paired.ci95),
                "p_value": paired.p_value,
                "win_rate": paired.win_rate,
            }
    return found


def _values(column: Column, reward: str, n: int) -> NDArray[np.float64]:
    return column.scores.get(reward, np.full(n, np.nan))


def _at(column: Column, reward: str, row: int) -> float | None:
    values = column.scores.get(reward)
    return None if values is None or not math.isfinite(values[row]) else float(values[row])


def _summary(path: Path) -> dict[str, Any]:
    return _read_summary(path, path.stat().st_mtime_ns)


def _scores(path: Path) -> StoredScores:
    return _read_scores(path, scores_path(path).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_summary(path: Path, changed: int) -> dict[str, Any]:
    return read_evaluation(path)


@lru_cache(maxsize=8)
def _read_scores(path: Path, changed: int) -> StoredScores:
    return read_scores(scores_path(path))
