"""The files of an evaluation: `evaluation.json`, and beside it the scores prompt by prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tiltflow.core.disk import write_whole
from tiltflow.core.settings import misfit
from tiltflow.evaluation.categories import category_of
from tiltflow.evaluation.scores import Evaluation, PromptLike

NAME = re.compile(r"[A-Za-z0-9][\w .=:@-]*")
"""Systems' names are folders' names as well: no separators, and nothing that starts with a dot."""

Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Score(_Part):
    mean: float
    ci95: Interval


class _System(_Part):
    nfe: int
    scores: dict[str, _Score]
    vendi: _Score | None = None
    cmmd: float | None = None
    category_means: dict[str, float] = {}


class _Mean(_Part):
    mean: float


class _Category(_Part):
    prompts: int
    systems: dict[str, dict[str, _Mean]]


SIZE = r"[0-9]{1,9}(x[0-9]{1,9}){0,2}"
"""A size's name (`core.sizes.said`), which is a folder's as well; a video's has three numbers."""


class _Comparison(_Part):
    a: str
    b: str
    reward: str
    difference: float
    ci95: Interval
    p_value: float


class _Asked(_Part):
    steps: int | None = None
    teacher_steps: int | None = None
    tilt: float | None = None
    merged: float | None = None
    seed: int | None = None
    eta: float | None = None
    student_guidance: float | None = None
    resolution: int | tuple[int, int] | tuple[int, int, int] | None = None
    sizes: list[tuple[str, Any]] = []
    max_sequence_length: int | None = None
    revisions: dict[str, int] = {}


class _Content(_Part):
    prompts: str | None = None
    rewards: dict[str, str] = {}


class _Evaluation(_Part):
    prompts: int
    asked: _Asked | None = None
    content: _Content | None = None
    columns: dict[str, str] = {}
    adapters: dict[str, str] = {}
    weights: str | None = None
    diversity_in: dict[str, Any] | None = None
    systems: Annotated[dict[str, _System], Field(min_length=1)]
    comparisons: list[_Comparison] = []
    categories: dict[str, _Category] = {}
    sizes: dict[Annotated[str, Field(pattern=f"^{SIZE}$")], _Category] = {}


@dataclass(frozen=True)
class StoredScores:
    """The scores of an evaluation: `scores[system][reward]` are values (N,) by prompt, not a
    number where a prompt was not measured; `prompts` are the N texts, `categories` theirs, None
    where there is none; `sizes` those that each has samples of, where there are several."""

    prompts: tuple[str, ...]
    scores: dict[str, dict[str, NDArray[np.float64]]]
    categories: tuple[str | None, ...] = ()
    sizes: tuple[tuple[str, ...], ...] = ()


def write_evaluation(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write `evaluation.json`.

    Raises:
        ValueError: if a figure is not finite.
    """
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(Path(path), text)


def scores_path(path: Path) -> Path:
    """Where the scores of the evaluation at `path` lie: evaluation.scores.jsonl."""
    return path.with_suffix(".scores.jsonl")


def write_scores(path: Path, evaluation: Evaluation, prompts: Sequence[PromptLike]) -> None:
    """Write `path`, one JSON object a prompt: {"prompt": TEXT, "scores": {SYSTEM: {REWARD: x}}},
    with its "category" where it has one, and of several sizes the "sizes" with the scores at each.

    What was measured on some of the prompts only (diversity) stands at these.
    """
    rows: list[dict[str, Any]] = [
        {"prompt": prompt.text, "scores": {system: {} for system in evaluation.scores}}
        | ({} if (category := category_of(prompt.metadata)) is None else {"category": category})
        for prompt in prompts
    ]
    for system, table in evaluation.scores.items():
        for reward, values in table.items():
            at = evaluation.measured.get(reward, range(len(prompts)))
            for index, value in zip(at, values, strict=True):
                rows[index]["scores"][system][reward] = float(value)
    for size, sized in evaluation.sizes.items():
        for place, number in enumerate(sized.rows):
            rows[number].setdefault("sizes", {})[size] = {
                system: {reward: float(values[place]) for reward, values in table.items()}
                for system, table in sized.scores.items()
            }
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows]
    write_whole(path, "\n".join(lines) + "\n")


def read_scores(path: Path, size: str | None = None) -> StoredScores:
    """What `write_scores` wrote; of several sizes, the means over them, or the prompts and scores
    at one `size`.

    Raises:
        ValueError: if there is no such file, or size in it, or a line is none of an evaluation.
    """
    if not path.is_file():
        raise ValueError(f"there are no scores at {path}: run tiltflow evaluate again")
    rows, categories, sizes = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            category = row.get("category")
            of = {str(name): table for name, table in row.get("sizes", {}).items()}
            if size is not None and size not in of:
                continue
            scores = row["scores"] if size is None else of[size]
            rows.append((str(row["prompt"]), {s: dict(t) for s, t in scores.items()}))
            categories.append(None if category is None else str(category))
            sizes.append(tuple(of) if size is None else ())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} holds no scores of an evaluation") from error
    if size is not None and not rows:
        raise ValueError(f"{path} has no scores of pictures of the size {size}")
    names = {s: dict.fromkeys(r for _, table in rows for r in table.get(s, {})) for s in _all(rows)}
    found = {
        system: {
            reward: np.array([table.get(system, {}).get(reward, np.nan) for _, table in rows])
            for reward in rewards
        }
        for system, rewards in names.items()
    }
    texts = tuple(text for text, _ in rows)
    return StoredScores(texts, found, tuple(categories), tuple(sizes))


def _all(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The systems of all rows, in order."""
    return list(dict.fromkeys(system for _, table in rows for system in table))


def read_evaluation(path: Path) -> dict[str, Any]:
    """An `evaluation.json`, or the one in a run directory.

    Raises:
        ValueError: if the file is missing or no evaluation, saying what is wrong in it.
    """
    path = evaluation_path(path)
    if not path.is_file():
        raise ValueError(f"there is no evaluation at {path}: run tiltflow evaluate --json {path}")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(summary, dict) or "systems" not in summary:
        raise ValueError(f"{path} is no evaluation (it has no systems)")
    try:
        _Evaluation.model_validate(summary)
    except ValidationError as error:
        raise ValueError(f"{path} is no evaluation ({misfit(error)})") from error
    for name in summary["systems"]:
        if not NAME.fullmatch(name):
            raise ValueError(f"{path} has a system called {name!r}, which is no plain name")
    return {"comparisons": [], **summary}


def is_of(
    summary: Mapping[str, Any], adapters: Mapping[str, str | None], weights: str | None = None
) -> bool:
    """Whether an evaluation is of the student with these fingerprints: of its adapters by name, as
    far as it says (earlier versions did not), or of its `weights`, where it is a full copy. These
    it has to say: any copy's evaluation without would pass for this one's."""
    scored: Mapping[str, str] = summary.get("adapters", {})
    same = all(adapters.get(name) in (None, mark) for name, mark in scored.items())
    return same and summary.get("weights") == weights


def evaluation_path(path: Path) -> Path:
    """The evaluation.json of a directory, or the file itself."""
    return path / "evaluation.json" if path.is_dir() else path
