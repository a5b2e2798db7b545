"""An `evaluation.json` read back, which may have come from anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class _Comparison(_Part):
    a: str
    b: str
    reward: str
    difference: float
    ci95: Interval
    p_value: float


class _Evaluation(_Part):
    prompts: int
    systems: Annotated[dict[str, _System], Field(min_length=1)]
    comparisons: list[_Comparison] = []


def read_evaluation(path: Path) -> dict[str, Any]:
    """An `evaluation.json`, or the one in a run directory.

    Raises:
        ValueError: if the file is missing or no evaluation, saying what is wrong in it.
    """
    if path.is_dir():
        path = path / "evaluation.json"
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
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is no evaluation ({place}: {first['msg']})") from error
    for name in summary["systems"]:
        if not NAME.fullmatch(name):
            raise ValueError(f"{path} has a system called {name!r}, which is no plain name")
    return {"comparisons": [], **summary}
