"""The dial: one loaded student at a time, asked by one request at a time."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltflow.core.limits import STRONGEST_TILT
from tiltflow.desk.sources import Place
from tiltflow.evaluation.chunks import place_of
from tiltflow.tasks.dial import Student, facts, load_student
from tiltflow.tasks.dial_grid import packed, picture_file, read_grid, read_scores

PICTURES = 32
"""Images that are kept for the page to fetch: the latest."""
LONGEST_PROMPT = 4000


class Dial:
    """The student that was loaded last, and the latest images it made.

    Several browsers share it. So a student has a name, which whoever asks for an image or scores
    gives: after another was loaded, the first one's page is told so, and shown nothing of it.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self._lock = threading.Lock()
        self._student: tuple[object, str, Student] | None = None
        self._pictures: OrderedDict[str, bytes] = OrderedDict()

    def load(self, runs: Sequence[Place], side: int | None) -> dict[str, Any]:
        """Loads the student of some runs, unless it is the one that is there and their files are
        as they were: a run may have been exported anew.

        Raises:
            ValueError: as `load_student`.
        """
        with self._lock:
            # Before its files are read: what changes while they are is loaded the next time.
            key = ([_files(place.path) for place in runs], side)
            if self._student is None or self._student[0] != key:
                self._student = None  # its memory goes before the next one's comes
                made = load_student([p.path for p in runs], side, self.device)
                # The first image takes longer than later ones: now, and not at the first turn.
                made.image([1.0] * len(runs), "", 0, made.request.settled.steps)
                self._student = (key, secrets.token_hex(8), made)
            _, name, student = self._student
            about = facts(student)
        names = [place.name for place in runs]
        return {**about, "student": name, "dials": names, "strongest": STRONGEST_TILT}

    def image(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Makes an image; the answer names it and says how long it took.

        Raises:
            ValueError: if no student or another is loaded, or what is asked for is no number or out
                of range.
        """
        strengths, prompt = _numbers(asked), asked.get("prompt")
        seed, steps = _whole(asked, "seed"), _whole(asked, "steps")
        if not isinstance(prompt, str) or not 0 < len(prompt) <= LONGEST_PROMPT:
            raise ValueError(f"a prompt has 1 to {LONGEST_PROMPT} characters")
        with self._lock:
            began = time.perf_counter()
            made = self._loaded(asked).image(strengths, prompt, seed, steps)
            took = time.perf_counter() - began
            key = secrets.token_hex(8)
            self._pictures[key] = packed(made)
            while len(self._pictures) > PICTURES:
                self._pictures.popitem(last=False)
        return {"picture": key, "seconds": took}

    def picture(self, key: str) -> bytes:
        """An image as PNG. Raises KeyError if it is not kept (any more)."""
        return self._pictures[key]

    def scores(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Rewards at some strengths and in some steps, on the run's held-out prompts.

        Raises:
            ValueError: as `image`.
        """
        strengths, steps = _numbers(asked), _whole(asked, "steps")
        with self._lock:
            return {"scores": self._loaded(asked).scores(strengths, steps)}

    def _loaded(self, asked: Mapping[str, Any]) -> Student:
        if self._student is None:
            raise ValueError("no student is loaded")
        _, name, student = self._student
        if asked.get("student") != name:
            raise ValueError("another student has been loaded meanwhile: load this one again")
        return student


def _files(run: Path) -> list[Any]:
    """What stands for all of a run that a student is loaded from."""
    export = run / "export"
    return [place_of(p) for p in (export / "few_step", export / "tilt", run / "config.yaml")]


def view(folder: Path) -> dict[str, Any]:
    """A dial that was computed beforehand: its grid, the pictures that are there as numbers of
    (prompt, seed, strength), and a row of rewards a strength, None where they are not.

    Raises:
        ValueError: if a file of it cannot be read.
    """
    grid = read_grid(folder)
    made = {(p, s, t) for p, s, t in grid.places() if picture_file(folder, p, s, t).is_file()}
    scores = read_scores(folder, grid)
    return {
        **grid.model_dump(exclude={"digest"}),
        "made": sorted(made),
        "of": len(grid.places()),
        "scores": [scores.get(strength) for strength in grid.strengths],
    }


def _whole(asked: Mapping[str, Any], name: str) -> int:
    found = asked.get(name)
    if type(found) is not int:
        raise ValueError("seed and steps are whole numbers")
    return found


def _numbers(asked: Mapping[str, Any]) -> list[float]:
    found = asked.get("strengths")
    plain = isinstance(found, list) and all(
        type(x) in (int, float) and math.isfinite(x) for x in found
    )
    if not plain:
        raise ValueError("strengths is a list of numbers")
    assert isinstance(found, list)
    return [float(x) for x in found]
