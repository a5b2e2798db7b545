"""The folder of an export, replaced as a whole: a kill or a full disk leaves the old one as it was.

OUT                  what the last export wrote
.OUT.part-PID        one that is being written
.OUT.old-PID         the last one, for the moment between two renames
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiltflow.core.disk import at_work, fsync, writing
from tiltflow.formats.contract import CONTRACT_FILE, LICENCES
from tiltflow.models.switch import FEW_STEP, TILT

STRENGTH = r"_[0-9.e-]+"
"""What the name of something at a strength of the tilt ends with."""
NAME = rf"({FEW_STEP}|{TILT}|baked{STRENGTH})"
LORA = rf"pytorch_lora_weights\.safetensors|{re.escape(CONTRACT_FILE)}"
INSIDE = {
    NAME: LORA,
    "scheduler": r"scheduler_config\.json",
    "comfyui": rf"{NAME}\.safetensors|workflow\.json",
    "kohya": rf"{NAME}\.safetensors",
    "peft": rf"{NAME}(/adapter_model\.safetensors|/adapter_config\.json)?",
    "original": rf"transformer({STRENGTH})?\.safetensors|workflow({STRENGTH})?\.json",
}
"""An export's folders and what they hold, as patterns of paths."""
MERGED = rf"merged({STRENGTH})?"
"""Folders that are whole pipelines."""
FILES = {"README.md", CONTRACT_FILE, *LICENCES}


def check_export_folder(out: Path) -> None:
    """Whether an export may take the place of `out`: it is absent, empty, or an earlier export.

    Raises:
        ValueError: naming what in it is none of an export's.
    """
    out = out.resolve()
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, but the export is a folder: give another one")
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which no export can replace: give {out}/export")
    foreign = sorted(_foreign(out))
    if foreign:
        raise ValueError(
            f"{out} holds {foreign[0]!r}, which is none of an export's, and an export replaces the "
            "whole folder: give another one"
        )


def of_an_export(path: str) -> bool:
    """Whether a file, by its path in an export's folder, is one that an export writes into one of
    its folders; all of a merged pipeline is."""
    top, _, rest = path.partition("/")
    inside = next((INSIDE[name] for name in INSIDE if re.fullmatch(name, top)), None)
    if inside is None:
        return bool(rest) and re.fullmatch(MERGED, top) is not None
    return re.fullmatch(inside, rest) is not None


def _foreign(out: Path) -> Iterator[str]:
    """What in a folder no export has written, by the path in it."""
    for entry in out.iterdir():
        inside = next((INSIDE[name] for name in INSIDE if re.fullmatch(name, entry.name)), None)
        if inside is not None and entry.is_dir():
            paths = [path.relative_to(entry).as_posix() for path in entry.rglob("*")]
            yield from (f"{entry.name}/{p}" for p in paths if not re.fullmatch(inside, p))
        elif re.fullmatch(MERGED, entry.name):
            if not (entry / "model_index.json").is_file():
                yield f"{entry.name}, which is no pipeline"
        elif inside is None and entry.name not in FILES:
            yield entry.name


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new empty folder beside `out`, which takes its place when all has gone well.

    Raises:
        ValueError: as `check_export_folder`.
        OSError: if it cannot be written; `out` is then as it was.
    """
    out = out.resolve()
    check_export_folder(out)
    part, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("part", "old"))
    with writing(out, "; no export was written, and what was there before is as it was"):
        out.parent.mkdir(parents=True, exist_ok=True)
        _tidy(out)
        try:
            part.mkdir()
            mode = _mode_of_new_files(part)
            yield part
            for path in sorted(part.rglob("*"), reverse=True):
                if path.is_file():
                    path.chmod(mode)  # safetensors makes every file one for its owner alone
                fsync(path)
            fsync(part)
            if out.exists():
                os.rename(out, old)
            try:
                os.rename(part, out)
            except BaseException:
                if old.exists() and not out.exists():
                    os.rename(old, out)
                raise
            fsync(out.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _mode_of_new_files(folder: Path) -> int:
    probe = folder / "probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _tidy(out: Path) -> None:
    """Puts back what a kill between the two renames left aside, and drops other leftovers."""
    left = re.compile(rf"\.{re.escape(out.name)}\.(part|old)-(\d+)")
    found = [(m, p) for p in out.parent.iterdir() if (m := left.fullmatch(p.name))]
    for match, path in found:
        if at_work(int(match[2])):
            continue
        if match[1] == "old" and not out.exists():
            os.rename(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)
