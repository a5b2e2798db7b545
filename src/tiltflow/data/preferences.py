"""Choices between two images of one prompt: the desk's votes, and the sets that others publish."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltflow.core.disk import fsync, parse_json
from tiltflow.models.medium import frames_in, spread
from tiltflow.rewards.frames import FRAMES

MOST_PIXELS = 64 * 1024 * 1024
"""Of an image."""
CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Preference:
    """Two images of `prompt`: their files, or the files' bytes. `choice` is 1 where the first was
    chosen, 0 where the second was, ½ for neither. `digests` are what the files were (SHA-256), and
    `when` the moment of the vote, as far as the desk or whoever took it wrote them down."""

    prompt: str
    first: Path | bytes
    second: Path | bytes
    choice: float
    digests: tuple[str, str] | None = None
    when: float | None = None

    @property
    def vote(self) -> tuple[object, ...] | None:
        """What tells a vote from every other, wherever its line stands; None where its moment is
        not known: then two like lines may be two votes."""
        if self.when is None:
            return None
        return (self.when, self.prompt, self.choice, *self.known)

    @property
    def known(self) -> tuple[str, str]:
        """What the two images are known by: what they are, else where they lie."""
        return self.digests or (_key(self.first), _key(self.second))

    def images(self) -> tuple[Tensor, Tensor]:
        """Both images, each (F, 3, H, W) in [0, 1]: one, or of a video the frames by which a reward
        of images scores it (`rewards.frames`).

        Raises:
            ValueError: if one cannot be read, or is not the one that was looked at.
        """
        first, second = self.digests or (None, None)
        return _read(self.first, first), _read(self.second, second)


def _read(source: Path | bytes, digest: str | None) -> Tensor:
    name = str(source) if isinstance(source, Path) else "an image of the file"
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except (OSError, ValueError) as error:  # a name may have a null character in it
        raise ValueError(f"{name} is no image that can be read") from error
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{name} is another image than the one that was voted on")
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{name} has too many pixels")
            seen = frames_in(image, lambda count: spread(count, FRAMES))
            pixels = np.stack([np.asarray(frame) for frame in seen])
    except (EOFError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no image that can be read") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def append_vote(path: Path, row: Mapping[str, Any]) -> None:
    """One more line in a file of votes; it is on the disk when this returns.

    Several processes may append at once. What a killed one left of a line is cut off first; a whole
    line that lacks its newline, as editors leave it, gets one. A vote that did not reach the disk
    is taken back: given again, it counts once.

    Raises:
        OSError: if it cannot be written.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    new = not path.exists()
    with path.open("a+b", buffering=0) as file:  # or closing it might write what failed
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        whole = _whole(file, size)
        if whole < size:
            file.seek(whole)
            if _object(file.read(size - whole)) is None:
                file.truncate(whole)
            else:
                line, whole = b"\n" + line, size
        try:
            rest = line
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise
    if new:
        fsync(path.parent)


def _whole(file: Any, size: int) -> int:
    """How many of a file's bytes are whole lines."""
    at = size
    while at:
        start = max(0, at - 65_536)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        at = start
    return 0


def read_votes(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of votes; a torn last one is left out, and where there is no file, none.
    A last line that is whole and lacks its newline is one like the others.

    Raises:
        ValueError: if another line is no vote.
    """
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if _object(last) is not None:
        lines.append(last)
    return [_vote(path, number, line) for number, line in enumerate(lines, start=1)]


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None of anything else, such as a part of one."""
    try:
        found = parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _vote(path: Path, number: int, line: bytes) -> dict[str, Any]:
    texts = ("prompt", "image_a", "image_b", "choice")
    row = _object(line)
    if row is None or not all(isinstance(row.get(key), str) for key in texts):
        raise ValueError(f"{path}, line {number} is no vote (prompt, image_a, image_b, choice)")
    if row["choice"] not in CHOICES:
        raise ValueError(f"{path}, line {number}: choice is a, b or tie, not {row['choice']!r}")
    return row


def load_preferences(path: Path) -> list[Preference]:
    """Preferences from a local file, by its suffix:

    - `.jsonl`: the desk's votes, a line each: {"prompt", "image_a", "image_b", "choice": "a", "b"
      or "tie"}; images are paths from the file's folder, and may have "sha256_a" and "sha256_b".
    - `.parquet`: Pick-a-Pic (Kirstain et al. 2023): caption, jpg_0, jpg_1, label_0 (1, 0 or ½).
    - `.json`: HPD v2 (Wu et al. 2023), a list of {"prompt", "image_path": [...],
      "human_preference": [...]}, of which every two images with different values are a pair; or
      HPD v3 (Ma et al. 2025), {"prompt", "path1", "path2"}, the first being the chosen one. Images
      are beside the file, or in a folder of its name.

    Raises:
        ValueError: if there is no such file, it is none of these, or a package for it is missing.
    """
    if not path.is_file():
        raise ValueError(f"there is no file of preferences {path}")
    readers = {".jsonl": _own, ".parquet": _pick_a_pic, ".json": _hpd}
    if path.suffix not in readers:
        raise ValueError(f"{path}: preferences are in .jsonl, .parquet (Pick-a-Pic) or .json (HPD)")
    found = list(readers[path.suffix](path))
    if not found:
        raise ValueError(f"{path} holds no preference")
    return found


def _own(path: Path) -> Iterator[Preference]:
    for row in read_votes(path):
        digests = (row.get("sha256_a"), row.get("sha256_b"))
        known = isinstance(digests[0], str) and isinstance(digests[1], str)
        yield Preference(
            row["prompt"],
            path.parent / row["image_a"],
            path.parent / row["image_b"],
            CHOICES[row["choice"]],
            digests if known else None,  # type: ignore[arg-type]
            when if isinstance(when := row.get("time"), int | float) else None,
        )


def _pick_a_pic(path: Path) -> Iterator[Preference]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow (pip install 'tiltflow[parquet]')") from error
    columns = ["caption", "jpg_0", "jpg_1", "label_0"]
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path} is not Pick-a-Pic's: it has no column {missing[0]!r}")
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    yield _pick(path, row)
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{path} is no parquet file that can be read") from error


def _pick(path: Path, row: Mapping[str, Any]) -> Preference:
    images, label = (row["jpg_0"], row["jpg_1"]), row["label_0"]
    if not all(isinstance(image, bytes) for image in images) or label not in (0, 0.5, 1):
        raise ValueError(f"{path} has a row without both images or a label_0 of 0, 0.5 or 1")
    return Preference(str(row["caption"]), images[0], images[1], float(label))


def _hpd(path: Path) -> Iterator[Preference]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} is not HPD's: it is no list")
    for number, row in enumerate(rows, start=1):
        try:
            yield from _hpd_pairs(path, row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, entry {number} is not HPD's") from error


def _hpd_pairs(path: Path, row: Mapping[str, Any]) -> Iterator[Preference]:
    prompt = str(row["prompt"])
    if "path1" in row:
        yield Preference(prompt, _beside(path, row["path1"]), _beside(path, row["path2"]), 1.0)
        return
    files = [_beside(path, name) for name in row["image_path"]]
    marks = list(row["human_preference"])
    if not all(isinstance(mark, int | float) and mark == mark for mark in marks):
        raise TypeError("a mark is no number")
    if len(files) != len(marks):
        raise ValueError(f"{path}: {len(files)} images with {len(marks)} marks")
    for i, first in enumerate(files):
        for j in range(i + 1, len(files)):
            if marks[i] != marks[j]:
                yield Preference(prompt, first, files[j], float(marks[i] > marks[j]))


def _beside(path: Path, name: str) -> Path:
    """An image that a set of others names: below the set's folder, never outside it."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path} names an image outside its folder")
    inner = path.with_suffix("") / parts
    return inner if inner.is_file() else path.parent / parts


def agreement(preferences: Iterable[Preference]) -> tuple[int, int]:
    """Pairs that were judged more than once, ties aside, and how many of these contradict
    themselves: the same two images of a prompt, once so and once so."""
    seen: dict[tuple[object, ...], set[object]] = {}
    times: dict[tuple[object, ...], int] = {}
    for one in preferences:
        if one.choice == 0.5:
            continue
        first, second = one.known
        key = (one.prompt, *sorted((first, second)))
        chosen = first if one.choice == 1 else second
        seen.setdefault(key, set()).add(chosen)
        times[key] = times.get(key, 0) + 1
    repeated = [key for key, count in times.items() if count > 1]
    return len(repeated), sum(len(seen[key]) > 1 for key in repeated)


def _key(source: Path | bytes) -> str:
    return str(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
