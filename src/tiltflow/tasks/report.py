"""`tiltflow report`: the HTML page of one run or of several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiltflow.config.recipe_source import read_recipe, recipe_text
from tiltflow.core.checkpoint import latest_step
from tiltflow.core.metrics import read_metrics
from tiltflow.evaluation.files import is_of, read_evaluation
from tiltflow.evaluation.pictures import Sheet, pixels_of
from tiltflow.evaluation.report import write_report
from tiltflow.evaluation.scores import KEPT_IMAGES
from tiltflow.evaluation.statistics import correct
from tiltflow.evaluation.watch.history import FILE, read_history
from tiltflow.evaluation.watch_figures import Watched
from tiltflow.formats.contract import read_contract
from tiltflow.setup.run_directory import check_run
from tiltflow.tasks.beside import notes_of, one_noise, stored_prompts, told_apart
from tiltflow.tasks.doctor import versions
from tiltflow.tasks.evaluate import PROMPTS, kept_prompts
from tiltflow.tasks.sheets import prompt_files, sheets
from tiltflow.tasks.train import COLUMNS

IMAGES = "evaluation.images"
"""A folder beside evaluation.json: SYSTEM/NNNNN.png, and prompts.txt."""

GROUPS = ("categories", "sizes")
"""Of an evaluation: figures by groups of its prompts, or of its pictures."""

NOTICE = "notice.txt"
"""In a run directory, or the one above it: a sentence for the top of every page of its figures."""


def write_run_report(runs: Sequence[Path], out: Path | None) -> Path:
    """One page of run directories, side by side: what was evaluated, the watch, curves, samples.

    A directory whose sub-directories are runs (the demo's) counts as these. Without `out`, the page
    of one run lies in it, and that of several beside the first, under their names.

    Raises:
        ValueError: if a directory holds no run, or something in it cannot be read.
    """
    found: list[Path] = []
    for run in runs:
        inner = [p for p in (run / "cold_start", run / "tilt") if (p / "config.yaml").is_file()]
        if not inner:
            check_run(run)
        found += [run, *inner]
    return _write(found, out or _place(runs))


def _place(runs: Sequence[Path]) -> Path:
    """Where a page goes that was given no place: no run's own is overwritten by that of several."""
    if len(runs) == 1:
        return runs[0]
    apart = {run.absolute(): run for run in runs}  # one run may be given by two paths
    names = re.sub(r"[^\w.-]+", "_", "_".join(run_names(list(apart.values())).values()))
    called = names if len(names) <= 100 else f"of_{len(runs)}_runs"
    return runs[0].absolute().parent / f"report_{called}.html"


def _write(folders: Sequence[Path], out: Path, notice: str = "") -> Path:
    folders = list({f.absolute(): f for f in folders}.values())
    evaluation, grids, prompts = _evaluations([f for f in folders if _evaluated(f)])
    runs = [f for f in folders if (f / "metrics.jsonl").is_file()]
    names = run_names(runs)
    rows = {names[r]: read_metrics(r / "metrics.jsonl") for r in runs}
    texts = {names[r]: recipe_text(str(r / "config.yaml")) for r in runs}
    settings = {names[r]: read_recipe(str(r / "config.yaml")) for r in runs}
    return write_report(
        out,
        title="tiltflow: " + " and ".join(dict.fromkeys(f.name for f in _tops(folders))),
        evaluation=evaluation,
        curves=rows,
        grids=grids,
        prompts=prompts,
        config=texts,
        versions=versions(),
        watch={
            names[r]: Watched(
                read_history(r / FILE), _rules(r, settings[names[r]]), _ended(rows[names[r]])
            )
            for r in runs
            if (r / FILE).is_file()
        },
        sheets=[sheet for r in runs for sheet in _sheets(r, names[r], settings[names[r]])],
        together=_together(settings),
        notice=notice or " ".join(dict.fromkeys(filter(None, map(_notice, folders)))),
    )


def _notice(folder: Path) -> str:
    """What is to be said of the figures in a folder, a run's or the demo's that it belongs to."""
    for place in (folder, folder.absolute().parent):
        if (place / NOTICE).is_file():
            return (place / NOTICE).read_text(encoding="utf-8").strip()
    of = _of_another(folder) if _evaluated(folder) else None
    return "" if of is None else f"The evaluation in {folder.name} is of {of}: evaluate it again."


def _of_another(run: Path) -> str | None:
    """What a run's evaluation is of, where it says that it is of another student than the one
    exported last, or the run has gone on since; else None."""
    places = [run / "export" / name for name in ("tilt", "few_step", "merged")]
    found = (read_contract(place) for place in places if place.is_dir())
    contract, summary = next(filter(None, found), None), read_evaluation(run)
    if contract is None or not (summary.get("adapters") or summary.get("weights")):
        return None
    if not is_of(summary, contract.hashes, contract.weights):
        return "other weights than its export has now"
    step, now = contract.recipe.get("iterations"), latest_step(run)
    if isinstance(step, int) and now is not None and now > step:
        return f"iteration {step}, and the run has gone on to {now}"
    return None


def _tops(folders: Sequence[Path]) -> list[Path]:
    """The folders that lie in no other of them."""
    return [f for f in folders if not any(other in f.parents for other in folders)]


def _ended(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sentence with which the watch ended the run, or nothing."""
    said = [str(row["watch/ended"]) for row in rows if "watch/ended" in row]
    return said[-1] if said else ""


def _rules(run: Path, settings: Mapping[str, Any]) -> dict[str, float | None]:
    """The thresholds of the watch's rules, as the run's config has them.

    Raises:
        ValueError: if they are no numbers, in a config that was edited.
    """
    watch = settings.get("watch")
    rules = watch.get("rules") if isinstance(watch, dict) else None
    rules = {} if rules is None else rules
    numbers = isinstance(rules, dict) and all(
        rule is None or (isinstance(rule, int | float) and math.isfinite(rule))
        for rule in rules.values()
    )
    if not numbers:
        raise ValueError(f"{run / 'config.yaml'}: watch.rules should hold numbers by name")
    return rules


def _sheets(run: Path, name: str, settings: Mapping[str, Any]) -> list[Sheet]:
    """The first and the last sheet of samples that a run drew. Those of a medium of one's own are
    left in one piece: how it lays out its samples is its own matter."""
    pictures = sheets(run)
    model = settings.get("model")
    own = isinstance(model, dict) and model.get("medium") is not None
    texts = {} if own else prompt_files(run)
    return [
        Sheet(
            name,
            step,
            pixels_of(pictures[step]),
            kept_prompts(texts[step]) if step in texts else (),
            COLUMNS,
        )
        for step in dict.fromkeys([*list(pictures)[:1], *list(pictures)[-1:]])
    ]


def _together(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The runs of one stage, where there are several."""
    stages: dict[str, list[str]] = {}
    for name, values in settings.items():
        stages.setdefault(str(values.get("stage")), []).append(name)
    return [names for names in stages.values() if len(names) > 1]


def _evaluated(folder: Path) -> bool:
    return (folder / "evaluation.json").is_file()


def _evaluations(
    folders: Sequence[Path],
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]], list[str]]:
    """The folders' evaluations as one, with the kept images by system and their prompts.

    Of several, a system is called by its folder, too, unless it has the same scores in every
    folder (the teacher, as a rule). So is a column whose scores are not to be compared
    (`told_apart`). Images are shown of those folders whose prompts are the first's, and categories
    and sizes where all have the same ones.
    """
    merged: dict[str, Any] = {"prompts": 0, "systems": {}, "comparisons": []} | {
        kind: {} for kind in GROUPS
    }
    grids: dict[str, list[np.ndarray]] = {}
    prompts: list[str] = []
    names = run_names(folders)
    read = {folder: read_evaluation(folder) for folder in folders}
    texts_of = {folder: stored_prompts(folder) for folder in folders}
    tables = told_apart(read, texts_of, names)
    groups = {kind: _groups(kind, tables) for kind in GROUPS}
    for folder, found in tables.items():
        called = {}
        for system, values in found["systems"].items():
            same = all(t["systems"].get(system) == values for t in tables.values())
            called[system] = system if same else f"{system}, {names[folder]}"
            merged["systems"][called[system]] = values
        for kind in GROUPS:
            for group, table in groups[kind][folder].items():
                into = merged[kind].setdefault(group, table | {"systems": {}})
                into["systems"] |= {called[s]: v for s, v in table["systems"].items()}
        for row in found["comparisons"]:
            renamed = row | {"a": called[row["a"]], "b": called[row["b"]]}
            if renamed not in merged["comparisons"]:
                merged["comparisons"].append(renamed)
        images, texts = _images(folder / IMAGES, found)
        if not prompts or texts == prompts:
            prompts = texts
            grids |= {called[system]: kept for system, kept in images.items()}
    if not folders:
        return {}, {}, []
    if len(folders) > 1:  # one table, so one correction for the number of its comparisons
        correct(merged["comparisons"])
    else:
        merged["asked"] = tables[folders[0]].get("asked")
    merged["prompts"] = " and ".join(dict.fromkeys(str(t["prompts"]) for t in tables.values()))
    merged["one_noise"] = one_noise(read, texts_of)
    merged["notes"] = notes_of(read, texts_of)
    return merged, grids, prompts


def _groups(kind: str, tables: Mapping[Path, Mapping[str, Any]]) -> dict[Path, Mapping[str, Any]]:
    """The categories, or sizes, of each folder's evaluation; of none, if they are not alike."""
    found = {folder: table.get(kind, {}) for folder, table in tables.items()}
    shapes = [{name: c["prompts"] for name, c in groups.items()} for groups in found.values()]
    alike = all(shape == shapes[0] for shape in shapes)
    return found if alike else {folder: {} for folder in tables}


def run_names(runs: Sequence[Path]) -> dict[Path, str]:
    """A run's name: its folder's, with as many of the parents' as tell it from the others, which
    are other folders."""

    def last(run: Path, parts: int) -> str:
        return "/".join(run.absolute().parts[-parts:])

    names = {}
    for run in runs:
        parts = 1
        while sum(last(other, parts) == last(run, parts) for other in runs) > 1:
            parts += 1
        names[run] = last(run, parts)
    return names


def _images(folder: Path, evaluation: Mapping) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """The kept images by system, in the evaluation's order, and their prompts; of a prompt at
    several sizes one after the other."""
    prompts = kept_prompts(folder / PROMPTS)
    if not prompts:
        return {}, []
    systems = evaluation["systems"]
    sizes = [
        size
        for size in evaluation.get("sizes", {})
        if any((folder / system / size).is_dir() for system in systems)
    ]
    grids = {}
    for system in systems:
        places = [folder / system / size for size in sizes] or [folder / system]
        files = [sorted(place.glob("*.png"))[:KEPT_IMAGES] for place in places]
        shown = [file for row in zip(*files, strict=False) for file in row][:KEPT_IMAGES]
        if shown:
            grids[system] = [pixels_of(file) for file in shown]
    named = [f"{prompt} ({size})" for prompt in prompts for size in sizes]
    return grids, named or list(prompts)
