"""A measurement in cells: each is kept when it is done, so that a killed one goes on."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from tiltflow.evaluation.statistics import mean_ci


def arguments(name: str, about: str | None, seeds: int, figure: bool = True) -> argparse.Namespace:
    """What such a script is asked: `seeds`, where its `runs` lie, its `out` and its `figure`."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=Path(f"docs/data/{name}.json"))
    if figure:
        parser.add_argument("--figure", type=Path, default=Path(f"docs/figures/{name}.svg"))
    torch.set_num_threads(1)
    return parser.parse_args()


def save_figure(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


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
