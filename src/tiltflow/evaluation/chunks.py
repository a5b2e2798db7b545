"""An evaluation's results chunk by chunk on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiltflow.core.disk import save_tensors, write_whole, writing

Made = dict[str, Tensor]
Take = Callable[[str, Callable[[], Made]], Made]
"""`take(key, make)`: the tensors of a chunk, made now or taken from where they were kept."""


def make_anew(key: str, make: Callable[[], Made]) -> Made:
    """The `Take` that keeps nothing."""
    return make()


class Chunks:
    """Keeps chunks as `FOLDER/FINGERPRINT/KEY.safetensors`; the fingerprint is that of `asked`.

    `asked` is whatever the results depend on, as JSON: results of another question lie in
    another folder and are never mixed in. A file has its name only when it is whole.

    Raises:
        ValueError: if JSON cannot hold `asked`; `take`, if a kept chunk cannot be read.
        OSError: naming the file that could not be written.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self._place, self._asked = folder, dict(asked)
        self._settle()

    def also(self, more: Mapping[str, Any]) -> None:
        """Adds to what was asked, before the first chunk: what is known once all is loaded."""
        if more:
            self._asked |= more
            self._settle()

    def _settle(self) -> None:
        self._text = json.dumps(self._asked, sort_keys=True, indent=1, allow_nan=False) + "\n"
        digest = hashlib.blake2b(self._text.encode(), digest_size=8).hexdigest()
        self.folder = self._place / digest

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def take(self, key: str, make: Callable[[], Made]) -> Made:
        path = self.folder / f"{quote(key, safe='')}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): delete it, and it is made again"
                ) from error
        made = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
        with writing(path):
            if not (self.folder / "asked.json").is_file():
                write_whole(self.folder / "asked.json", self._text)
            part = path.with_suffix(".part")
            save_tensors(made, part)
            os.replace(part, path)
        return made

    def clear(self) -> None:
        """Deletes these chunks, once their results are elsewhere, and the folder if it is empty."""
        if not self.folder.is_dir():
            return
        shutil.rmtree(self.folder)
        with suppress(OSError):  # not empty, or another rank was first
            self.folder.parent.rmdir()


def place_of(path: str | Path | None) -> Any:
    """What stands for the weights at a path in a fingerprint: sizes and times of the files there.

    A hub id stands for itself.
    """
    if path is None:
        return None
    root = Path(path)
    if not root.exists():
        return str(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    marks = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return {"path": str(root.resolve()), "files": marks}


def lasting(place: Any) -> Any:
    """Of `place_of`, what stays as it is where weights are copied: names and sizes of the files."""
    files = place.get("files") if isinstance(place, Mapping) else None
    if not isinstance(files, list):
        return place
    return [file[:2] if isinstance(file, list) else file for file in files]
