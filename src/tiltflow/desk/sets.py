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
from tiltflow.evaluation.statistics import correct, paired_comparison, score_ci, verdict
from tiltflow.tasks.compare import noise_of, own_columns, own_name

PAGE = 12
"""Prompts of a page of the table."""

Scores = Mapping[str, NDArray[np.float64]]
"""By reward, a value a prompt."""


@dataclass(frozen=True)
class Column:
    """A system: its figures, and where its images lie, if they were kept."""

    name: str
    nfe: int
    scores: Scores
    images: Path

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
class Set:
    """Evaluations whose images come from the same noise; where a prompt has images of several
    sizes, those of one `size`."""

    places: tuple[Place, ...]
    size: str | None = None

    @property
    def name(self) -> str:
        names = ", ".join(place.name for place in self.places)
        return names if self.size is None else f"{names}: {self.size}"

    @property
    def changed(self) -> str:
        """What is another text when one of the evaluations was written anew. Its images take
        their place last, a moment after its two files. (A text: a page's numbers do not hold
        nanoseconds.)"""
        paths = [place.path for place in self.places]
        files = [f for p in paths for f in (p, scores_path(p), p.with_suffix(".images"))]
        return " ".join(map(_written, files))


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


def group(evaluations: Mapping[str, Place], problems: list[str] | None = None) -> dict[str, Set]:
    """Evaluations by what makes them comparable; the key is a digest of that. Of several sizes each
    is a set: under a picture stands its own score. An evaluation that cannot be read (any more) is
    left out, and why is added to `problems`."""
    found: dict[str, list[Place]] = {}
    sizes: dict[str, str | None] = {}
    for place in evaluations.values():
        try:
            summary = _summary(place.path)
        except (OSError, ValueError) as error:
            if problems is not None and not isinstance(error, FileNotFoundError):
                problems.append(f"{place.name}: {error}")
            continue
        for size in _sizes(summary):
            noise = noise_of(summary)
            same: Any = place.id if noise is None else noise
            text = json.dumps(same if size is None else [same, size], sort_keys=True)
            key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
            found.setdefault(key, []).append(place)
            sizes[key] = size
    return {key: Set(tuple(places), sizes[key]) for key, places in found.items()}


def _sizes(summary: Mapping[str, Any]) -> list[str | None]:
    """The sizes that every prompt has images of, where these are several."""
    found = summary.get("sizes", {})
    every = all(each["prompts"] == summary["prompts"] for each in found.values())
    return list(found) if len(found) > 1 and every else [None]


def load_table(of: Set) -> Table:
    """The systems of comparable evaluations. One with the same scores in all of them (the
    teacher, as a rule) is one column; others are called by their evaluation, too, and so are
    rewards of one name that had other weights in each, and diversities in other features: these
    are not compared.

    Raises:
        ValueError: if a file of them cannot be read, or their prompts are not the same.
    """
    stored = {place: _scores(place.path, of.size) for place in of.places}
    summaries = {place: _summary(place.path) for place in of.places}
    tables = {place: _named(place, found, summaries) for place, found in stored.items()}
    first = next(iter(stored.values()))
    columns: dict[str, Column] = {}
    for place, found in stored.items():
        if found.prompts != first.prompts:
            raise ValueError(f"{place.name} has other prompts than {of.places[0].name}")
        for system, scores in tables[place].items():
            alone = all(_same(scores, other.get(system)) for other in tables.values())
            name = system if alone else f"{system}, {place.name}"
            nfe = int(summaries[place]["systems"].get(system, {}).get("nfe", 0))
            images = place.path.with_suffix(".images") / system / (of.size or "")
            columns.setdefault(name, Column(name, nfe, scores, images))
    return Table(first.prompts, first.categories, tuple(columns.values()))


def _named(
    place: Place, found: StoredScores, summaries: Mapping[Place, Mapping[str, Any]]
) -> dict[str, Scores]:
    """The scores of a place, by system and by reward under the name that it has in the set."""
    own = own_columns(summaries[place], summaries.values())
    return {
        system: {own_name(r, place.name) if r in own else r: v for r, v in table.items()}
        for system, table in found.scores.items()
    }


def _same(scores: Scores, other: Scores | None) -> bool:
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
    over all rows of the choice that were measured, with 95% intervals and a verdict, whose p-value
    is corrected for the number of columns (`evaluation/statistics.py`)."""
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
    found: dict[str, Any] = {
        "name": column.name,
        "nfe": column.nfe,
        "mean": None,
        "difference": None,
    }
    measured = np.isfinite(values)
    if measured.sum() > 1:
        texts = [prompts[row] for row in rows[measured]]
        mean, low, high = score_ci(values[measured], clusters=texts)
        found["mean"] = {"value": mean, "ci95": [low, high], "n": len(texts)}
    both = measured & np.isfinite(base)
    if column.name != choice.baseline and both.sum() > 1:
        texts = [prompts[row] for row in rows[both]]
        paired = paired_comparison(values[both], base[both], texts)
        found["difference"] = {
            "difference": paired.difference,
            "ci95": list(paired.ci95),
            "p_value": paired.p_value,
            "win_rate": paired.win_rate,
            "n": paired.n,
        }
    return found


def _values(column: Column, reward: str, n: int) -> NDArray[np.float64]:
    return column.scores.get(reward, np.full(n, np.nan))


def _at(column: Column, reward: str, row: int) -> float | None:
    values = column.scores.get(reward)
    return None if values is None or not math.isfinite(values[row]) else float(values[row])


def _written(file: Path) -> str:
    try:
        return f"{file.stat().st_mtime_ns:x}"
    except OSError:  # removed since the desk looked
        return ""


def _summary(path: Path) -> dict[str, Any]:
    return _read_summary(path, path.stat().st_mtime_ns)


def _scores(path: Path, size: str | None) -> StoredScores:
    return _read_scores(path, size, scores_path(path).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read_summary(path: Path, changed: int) -> dict[str, Any]:
    return read_evaluation(path)


@lru_cache(maxsize=32)
def _read_scores(path: Path, size: str | None, changed: int) -> StoredScores:
    return read_scores(scores_path(path), size)
