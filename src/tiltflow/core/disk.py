"""Small things about files that several modules need."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old one or the whole new one.

    What lies in the place of the half-written file (a killed writer's, or a planted link) is
    removed and not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with part.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def at_work(pid: int) -> bool:
    """Whether another process of this number is alive on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that others may read as they may read its neighbours.

    safetensors itself makes every file one that its owner alone may read.
    """
    with path.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    path.chmod(mode)


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: if it is none, or nested more deeply than anything that is written here.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def writing(place: Path, what: str = "") -> Iterator[None]:
    """Names `place` in the error of whoever fails to write it; `what` says more about it.

    Raises:
        OSError: with the system's number and sentence and `place` as its file, also in place of
            safetensors' own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own, with the system's number in its text
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        reason = os.strerror(number) if number else str(error)
        named = getattr(error, "filename", None)
        if named is not None and str(named) != str(place):
            reason += f" ({named})"
        raise OSError(number or errno.EIO, f"{reason}{what}", str(place)) from error
