"""A measurement in cells: each is kept when it is done, so that a killed one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiltflow.evaluation.statistics import mean_ci


class Cells:
    """The cells of one JSON file, beside the settings that they were measured with.

    Raises:
        SystemExit: if the file is of other settings, whose cells must not be mixed in.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.found: dict[str, Any] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != self.settings:
                raise SystemExit(
                    f"{path} is of other settings: move it away, or give another --out"
                )
            self.found = kept["cells"]

    def cell(self, name: str, make: Callable[[], Any]) -> Any:
        """The cell `name`, measured if it is not there."""
        if name not in self.found:
            self.found[name] = json.loads(json.dumps(make()))
            self._write()
            print(f"{name}: {json.dumps(self.found[name])[:160]}", flush=True)
        return self.found[name]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        lines = ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in self.found.items())
        new.write_text(f'{{"settings": {json.dumps(self.settings)},\n"cells": {{\n{lines}\n}}}}\n')
        os.replace(new, self.path)


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean over seeds and its 95% t interval; of a single seed, that seed three times."""
    return mean_ci(values) if len(values) > 1 else (values[0], values[0], values[0])


def spoken(values: list[float], digits: int = 3) -> str:
    """`interval` as a cell of a table; of a single seed, its value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return "{0:.{d}f} [{1:.{d}f}, {2:.{d}f}]".format(*interval(values), d=digits)
