"""What a desk shows: the run directories and evaluations that it was given, and nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiltflow.evaluation.files import scores_path
from tiltflow.tasks.dial_grid import FILE
from tiltflow.tasks.report import run_names


@dataclass(frozen=True)
class Place:
    """A run directory, or an evaluation's JSON file, as the page names it.

    `id` is a digest of the path: no path of this machine stands in an address.
    """

    id: str
    name: str
    path: Path


@dataclass(frozen=True)
class Sources:
    """By id, in the order in which they were given."""

    runs: dict[str, Place]
    evaluations: dict[str, Place]
    dials: dict[str, Place]
    """Folders that `tiltflow dial` has filled."""


def find_sources(given: Sequence[Path], strict: bool = True) -> Sources:
    """The runs and evaluations at the paths: run directories, folders of these (one level deep),
    evaluations by their JSON file or folder, and computed dials by their folder or the run they
    lie in.

    Raises:
        ValueError: naming the first path at which there is none, where that is `strict`: what is
            removed while a desk shows it hides nothing else.
    """
    runs: list[Path] = []
    evaluations: list[Path] = []
    dials: list[Path] = []
    for path in given:
        folders = [path] if path.is_dir() else []
        if folders and not _is_run(path):
            folders += sorted(p for p in path.iterdir() if _is_run(p))
        found = [folder for folder in folders if _is_run(folder)]
        scored = [path] if _is_evaluation(path) else [e for f in folders for e in _evaluations(f)]
        dialled = [p for f in folders for p in (f, *sorted(f.glob("*/"))) if _is_dial(p)]
        if strict and not found and not scored and not dialled:
            raise ValueError(
                f"{path} holds nothing for a desk: no run directory (config.yaml) and no "
                "evaluation (tiltflow evaluate --json)"
            )
        runs += found
        evaluations += scored
        dials += dialled
    return Sources(_places(runs), _places(evaluations), _places(dials))


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / "config.yaml")  # also of a folder that is closed to this user


def _is_dial(path: Path) -> bool:
    return os.path.isfile(path / FILE)


def _is_evaluation(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file() and scores_path(path).is_file()


def _evaluations(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if _is_evaluation(path)]


def _places(paths: Iterable[Path]) -> dict[str, Place]:
    """By id. What lies in a run under its usual name goes by the run's."""
    shown = {(p.parent if p.name in ("evaluation.json", "dial") else p): p for p in paths}
    found = {_id(path): (shorter, path) for shorter, path in shown.items()}
    named = run_names([shorter for shorter, _ in found.values()])
    return {id: Place(id, named[shorter], path) for id, (shorter, path) in found.items()}


def _id(path: Path) -> str:
    return hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
