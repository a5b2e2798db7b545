"""`tiltflow report`: the HTML page of one run or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tiltflow.commands.doctor import versions
from tiltflow.commands.evaluate import save_pngs, save_prompts
from tiltflow.evaluation.files import read_evaluation
from tiltflow.evaluation.report import write_report
from tiltflow.evaluation.scores import KEPT_IMAGES, Evaluation
from tiltflow.metrics import read_metrics
from tiltflow.prompts import Prompt

IMAGES = "evaluation.images"
"""A folder beside evaluation.json: SYSTEM/NNNNN.png, and prompts.txt."""


def write_evaluation_report(
    out: Path, evaluation: Evaluation, prompts: Sequence[Prompt], stages: Mapping[str, Path]
) -> Path:
    """Keeps the first images beside the evaluation and writes `report.html` from what is there."""
    folder = out / IMAGES
    count = 0
    for system, images in evaluation.images.items():
        count = max(count, len(images))
        save_pngs(folder, system, range(len(images)), images)
    if count:
        save_prompts(folder, prompts[:count])
    return _write([out, *stages.values()], out)


def write_run_report(runs: Sequence[Path], out: Path | None) -> Path:
    """One page of run directories: curves of each, and of the first what was evaluated.

    A directory whose sub-directories are runs (the demo's) counts as these.

    Raises:
        ValueError: if a directory holds no run.
    """
    found: list[Path] = []
    for run in runs:
        inner = [p for p in (run / "cold_start", run / "tilt") if (p / "config.yaml").is_file()]
        if not inner and not (run / "config.yaml").is_file():
            raise ValueError(f"{run} is no run directory (it has no config.yaml)")
        found += [run, *inner]
    return _write(found, out or runs[0])


def _write(folders: Sequence[Path], out: Path) -> Path:
    evaluations = [f for f in folders if (f / "evaluation.json").is_file()]
    evaluation = read_evaluation(evaluations[0]) if evaluations else {}
    grids, prompts = _images(evaluations[0] / IMAGES, evaluation) if evaluations else ({}, [])
    runs = [f for f in folders if (f / "metrics.jsonl").is_file()]
    names = _names(runs)
    return write_report(
        out,
        title=f"tiltflow: {folders[0].name}",
        evaluation=evaluation,
        curves={names[r]: read_metrics(r / "metrics.jsonl") for r in runs},
        grids=grids,
        prompts=prompts,
        config={names[r]: (r / "config.yaml").read_text() for r in runs},
        versions=versions(),
    )


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """A run's name is its folder's, with the parent's where two are alike."""
    names = [run.name for run in runs]
    return {r: r.name if names.count(r.name) == 1 else f"{r.parent.name}/{r.name}" for r in runs}


def _images(folder: Path, evaluation: Mapping) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """The kept images by system, in the evaluation's order, and their prompts."""
    if not (folder / "prompts.txt").is_file():
        return {}, []
    grids = {}
    for system in evaluation["systems"]:
        files = sorted((folder / system).glob("*.png"))[:KEPT_IMAGES]
        if files:
            grids[system] = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    return grids, (folder / "prompts.txt").read_text().splitlines()
