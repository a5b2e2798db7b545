"""The curve of docs/evidence.md: the exact checker as the reward, over the iterations.

    python scripts/checker_curve.py [--runs runs/checker]

With `--runs` (the cells of studies/checker.yaml) their logs are read and kept in
docs/data/study/checker_curve.json; the figure is drawn from that file, and how far the share rises
is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from tiltflow.core.disk import write_whole
from tiltflow.evaluation.statistics import mean_ci

matplotlib.use("agg")
matplotlib.rcParams["svg.hashsalt"] = "checker_curve"
ROOT = Path(__file__).parents[1]
ROWS = {"checker": "#1f5fa8", "checker_strong": "#c0392b"}
TRAINED, WATCHED = "reward/shapes", "watch/trained/shapes"
WINDOW = 4
"""Lines of the log that a point is the mean of: 20 iterations, 1,280 samples."""
ENDS = 6
"""Lines of 30 iterations."""


def read(runs: Path) -> dict[str, Any]:
    """By row and seed, the pairs (iteration, share) of both series."""
    found: dict[str, Any] = {}
    for row in ROWS:
        for log in sorted((runs / row).glob("seed-*/run/metrics.jsonl")):
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            series = {
                n: [(at["step"], at[n]) for at in lines if n in at] for n in (TRAINED, WATCHED)
            }
            found.setdefault(row, {})[log.parts[-3]] = series
    return found


def smoothed(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    whole = len(points) // WINDOW * WINDOW
    parts = [points[i : i + WINDOW] for i in range(0, whole, WINDOW)]
    return [(sum(x for x, _ in p) / WINDOW, sum(y for _, y in p) / WINDOW) for p in parts]


def draw(found: dict[str, Any], path: Path) -> None:
    """Each seed thin, their mean thick; what was trained on, and what the watch saw."""
    figure, (trained, watched) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for row, colour in ROWS.items():
        seeds = found[row].values()
        for axes, name in ((trained, TRAINED), (watched, WATCHED)):
            lines = [smoothed(s[name]) if name == TRAINED else s[name] for s in seeds]
            for line in lines:
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.8, alpha=0.5)
            mean = [(at[0][0], sum(y for _, y in at) / len(at)) for at in zip(*lines, strict=True)]
            axes.plot(*zip(*mean, strict=True), color=colour, marker="o", markersize=4, label=row)
    trained.set(title="samples of training, means of 20 iterations", ylabel="share that is right")
    watched.set(title="the watch's 96 held-out samples")
    for axes in (trained, watched):
        axes.set_xlabel("iterations")
        axes.spines[["top", "right"]].set_visible(False)
    trained.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def rise(found: dict[str, Any], row: str) -> tuple[float, float, float]:
    """From the first 30 iterations' samples to the last 30's: the mean over seeds, and its 95%
    interval."""
    lines = [[share for _, share in seed[TRAINED]] for seed in found[row].values()]
    return mean_ci([sum(line[-ENDS:]) / ENDS - sum(line[:ENDS]) / ENDS for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    kept = ROOT / "docs" / "data" / "study" / "checker_curve.json"
    if given.runs:
        write_whole(kept, json.dumps(read(given.runs)) + "\n")
    found = json.loads(kept.read_text())
    draw(found, ROOT / "docs" / "figures" / "checker_curve.svg")
    for row in ROWS:
        print("{}: {:+.3f} [{:+.3f}, {:+.3f}]".format(row, *rise(found, row)))


if __name__ == "__main__":
    main()
