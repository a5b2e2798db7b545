"""Which checkpoint of a run is its latest: a file that names it, whatever became of that file.

`checkpoints/latest` holds one line, `step-XXXXXX`. Runs of earlier versions have a symbolic link
of that name there, which is read as well. Copies of such a run (`cp -rL`, an archive, object
storage) have a directory there, or nothing: then the manifest in the directory says which step it
is a copy of, or the newest whole checkpoint is the latest.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from tiltflow.core.disk import fsync, parse_json, sha256

FORMAT = "tiltflow-checkpoint-1"
STEP = re.compile(r"step-(\d{6,})")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder of checkpoints has, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    matches = (STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def latest_name(folder: Path) -> str | None:
    """The name of the latest checkpoint in a folder of them; None where there is none at all.

    Where nothing says which it is, it is the newest whole one, and where none is whole the newest.
    """
    said = _said(folder / "latest")
    if said is not None:
        return said
    steps = steps_in(folder)
    whole = (step for step in steps if is_whole(folder / step_name(step)))
    chosen = next(whole, steps[0] if steps else None)
    return None if chosen is None else step_name(chosen)


def _said(path: Path) -> str | None:
    """What `latest` says: a file or a link by itself, a directory by its manifest."""
    if path.is_symlink():
        name = os.readlink(path)
    elif path.is_file():
        with path.open("rb") as file:  # whatever it is: no more than such a name is long
            name = file.read(64).decode(errors="replace").strip()
    elif path.is_dir():
        name = _step_of_copy(path)
    else:
        return None
    return name if STEP.fullmatch(name) else None


def _step_of_copy(path: Path) -> str:
    """The name of the checkpoint that the directory `latest` is a copy of, "" if it is not here."""
    try:
        name = step_name(int(read_manifest(path)["step"]))
    except (OSError, ValueError):
        return ""
    return name if (path.parent / name).is_dir() else ""


def point_at(folder: Path, name: str) -> None:
    """Makes `latest` say `name`, in one step; a directory in its place is removed."""
    latest, fresh = folder / "latest", folder / f".tmp-{os.getpid()}-latest"
    fresh.write_text(name + "\n", encoding="utf-8")
    fsync(fresh)
    if latest.is_dir() and not latest.is_symlink():
        aside = folder / f".tmp-{os.getpid()}-drop-latest"  # which nothing renames a file onto
        os.replace(latest, aside)
        os.replace(fresh, latest)
        shutil.rmtree(aside)
    else:
        os.replace(fresh, latest)
    fsync(folder)


def is_whole(path: Path) -> bool:
    try:
        verified(path)
    except ValueError:
        return False
    return True


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; a ValueError that says what is wrong otherwise."""
    if not path.is_dir():
        raise ValueError("does not exist")
    manifest = read_manifest(path)
    if path.name != step_name(manifest["step"]):
        raise ValueError(f"was renamed: its manifest says step {manifest['step']}")
    for name, digest in manifest["files"].items():
        if not NAME.fullmatch(name):
            raise ValueError(f"is not tiltflow's: its manifest names the file {name!r}")
        if not (path / name).is_file():
            raise ValueError(f"is torn: {name} is missing")
        if sha256(path / name) != digest:
            raise ValueError(f"is torn: {name} does not match its checksum")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, which has a step and files; a ValueError says what is wrong."""
    try:
        manifest = parse_json((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError("has no manifest.json, so it is torn or not tiltflow's") from error
    except ValueError as error:
        raise ValueError("is torn: its manifest.json is not valid JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"is not tiltflow's: its manifest does not say {FORMAT!r}")
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(files, dict) or "state.json" not in files or not isinstance(step, int):
        raise ValueError("is not tiltflow's: its manifest lacks a step or its files")
    return manifest
