"""Rewards and diversity along the dial: a tilt at strengths from 0 (stage 1) over 1 to 1.5.

For finished stage-2 runs of the embedded model, by name; of several runs of a name (its seeds) the
mean of each prompt. Scored as studies/paper.yaml scores: its prompts, from the same noise at every
strength, in as many steps as were trained.

    python benchmarks/tilt_curve.py NAME=RUN... [--count 512]
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from support.cells import Cells, save_figure
from support.students import paired, student_scores

from tiltflow.evaluation.scores import DIVERSITY

matplotlib.use("agg")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
REWARDS = ("shapes", "clipscore", "clipscore_heldout")
COLUMNS = (*REWARDS, DIVERSITY)


def scored(run: Path, strength: float, count: int) -> dict[str, list[float]]:
    return student_scores(run, REWARDS, count, tilt=strength, diversity=True)


def named(text: str) -> tuple[str, Path]:
    name, _, run = text.partition("=")
    if not run:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=RUN")
    return name, Path(run)


def runs_of(cells: Cells, name: str) -> int:
    return sum(cell.startswith(f"{name}, run ") for cell in cells.found) // len(STRENGTHS)


def at_strength(cells: Cells, name: str, strength: float) -> dict[str, list[float]]:
    """Every column's scores by prompt, their mean over the runs of the name."""
    found = [cells.found[f"{name}, run {run}, {strength:g}"] for run in range(runs_of(cells, name))]
    return {
        c: [sum(each) / len(each) for each in zip(*(at[c] for at in found), strict=True)]
        for c in COLUMNS
    }


def rows(cells: Cells, name: str) -> list[tuple[float, dict[str, tuple[float, float, float]]]]:
    """Of each strength, every column's difference to strength 0, paired, with its 95% interval."""
    start, found = at_strength(cells, name, 0), []
    for strength in STRENGTHS:
        at = at_strength(cells, name, strength)
        pairs = {c: paired(at[c], start[c], cells.settings["count"]) for c in COLUMNS}
        found.append((strength, {c: (p.difference, *p.ci95) for c, p in pairs.items()}))
    return found


def table(cells: Cells, names: list[str]) -> None:
    print(
        "| row | runs | strength | " + " | ".join(COLUMNS) + " |\n|---|---|---" + "|---" * 4 + "|"
    )
    for name in names:
        for strength, columns in rows(cells, name):
            at = at_strength(cells, name, strength)
            texts = []
            for column, (middle, low, high) in columns.items():
                mean = sum(at[column]) / len(at[column])
                change = f" ({middle:+.3f} [{low:+.3f}, {high:+.3f}])" if strength else ""
                texts.append(f"{mean:.3f}{change}")
            runs = runs_of(cells, name)
            print(f"| `{name}` | {runs} | {strength:g} | " + " | ".join(texts) + " |")


def plot(cells: Cells, names: list[str], path: Path) -> None:
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(12, 3))
    colours = ("#1f5fa8", "#c0392b", "#2e8b57")
    for name, colour in zip(names, colours, strict=False):
        found = rows(cells, name)
        for axis, column in zip(axes, COLUMNS, strict=True):
            middle, low, high = zip(*(columns[column] for _, columns in found), strict=True)
            axis.plot(STRENGTHS, middle, color=colour, marker="o", markersize=3, label=name)
            axis.fill_between(STRENGTHS, low, high, color=colour, alpha=0.15, linewidth=0)
    for axis, column in zip(axes, COLUMNS, strict=True):
        axis.axhline(0, color="#999999", linewidth=0.8)
        axis.set(title=column, xlabel="strength of the tilt")
    axes[0].set_ylabel("difference to stage 1")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=named, metavar="NAME=RUN")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("docs/data/tilt_curve.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/tilt_curve.svg"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(args.out, {"count": args.count})
    names, seen = list(dict.fromkeys(name for name, _ in args.runs)), Counter[str]()
    for name, run in args.runs:
        for strength in STRENGTHS:
            cell = f"{name}, run {seen[name]}, {strength:g}"
            cells.cell(cell, partial(scored, run, strength, args.count))
        seen[name] += 1
    table(cells, names)
    plot(cells, names, args.figure)


if __name__ == "__main__":
    main()
