"""A run's sheets of samples: a picture a step in its `samples`, and its prompts beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiltflow.core.disk import fsync, write_whole
from tiltflow.data.prompts import Prompt
from tiltflow.tasks.evaluate import PROMPTS, prompt_lines

SHEET = re.compile(r"step-(\d{6,})\.png")
MINE = re.compile(r"\.?step-(\d{6,})\.(png|txt)(\.part)?")
"""A sheet, its prompts, or what a killed writer left of either."""


def sheets(run: Path) -> dict[int, Path]:
    """The pictures by step, the oldest first."""
    return dict(sorted((int(m[1]), file) for file, m in _matching(run, SHEET)))


def prompt_files(run: Path) -> dict[int, Path]:
    """The file with the prompts of each sheet's images; no entry where they are not known.

    A run of an earlier version has one file for all its sheets. It is of those that were drawn
    last, so it says nothing of the others once there are sheets with a file of their own.
    """
    own = {step: _texts(file) for step, file in sheets(run).items()}
    found = {step: file for step, file in own.items() if file.is_file()}
    shared = run / "samples" / PROMPTS
    return found or (dict.fromkeys(own, shared) if shared.is_file() else {})


def sheet_mark(picture: Path) -> str:
    """What tells a picture from another that was drawn in its place."""
    about = picture.stat()
    return f"{about.st_mtime_ns:x}-{about.st_size:x}"


def save_sheet(run: Path, step: int, pixels: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Path:
    """Writes a sheet. The prompts come first, and each file in one step: a kill leaves no picture
    that is torn or has no prompts."""
    file = run / "samples" / f"step-{step:06d}.png"
    write_whole(_texts(file), prompt_lines(prompts))
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    Image.fromarray(pixels).save(part, "PNG")
    fsync(part)
    os.replace(part, file)
    return file


def drop_sheets(run: Path, after: int) -> None:
    """Removes the sheets of later steps: of a branch that the run does not go on with.

    Pictures go first, so that a kill leaves none without its prompts.
    """
    later = [file for file, match in _matching(run, MINE) if int(match[1]) > after]
    if any(file.suffix == ".png" for file in later):
        # An earlier version's one file for all sheets: it was written with the last of them.
        (run / "samples" / PROMPTS).unlink(missing_ok=True)
    for file in sorted(later, key=lambda file: file.suffix != ".png"):
        file.unlink(missing_ok=True)


def _matching(run: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    folder = run / "samples"
    names = os.listdir(folder) if folder.is_dir() else []
    return [(folder / m[0], m) for m in map(pattern.fullmatch, names) if m]


def _texts(picture: Path) -> Path:
    return picture.with_suffix(".txt")
