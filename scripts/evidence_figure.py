"""The tables and the figure of docs/evidence.md from the results that docs/data/study keeps.

python scripts/evidence_figure.py            prints the tables and draws the figure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from tiltflow.core.disk import write_whole
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.study_table import markdown, summarise

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
PANELS = {
    "shapes": "shapes: the exact checker, never trained on",
    "clipscore": "clipscore: what stage 2 trains on",
    "clipscore_heldout": "clipscore_heldout: another CLIP, never trained on",
}


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """A panel a reward: each row's mean with its 95% interval over prompts, stage 1 in grey."""
    systems = summary["systems"]
    names = list(systems)[::-1]
    figure, panels = plt.subplots(
        1, len(PANELS), figsize=(12, 0.27 * len(names) + 1.2), sharey=True
    )
    for axes, (reward, title) in zip(panels, PANELS.items(), strict=True):
        for at, name in enumerate(names):
            score = systems[name]["scores"][reward]
            low, high = score["ci95"]
            colour = "#777777" if systems[name]["stage"] == "cold_start" else "#1f5fa8"
            axes.plot([low, high], [at, at], color=colour, linewidth=2)
            axes.plot(score["mean"], at, "o", color=colour, markersize=5)
        start = systems["ac_dmd"]["scores"][reward]["mean"]
        axes.axvline(start, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def gains(summary: Mapping[str, Any], start: str) -> list[str]:
    """What each row of stage 2 gained over the stage 1 that it started from, trained or not: the
    paired differences with their intervals over prompts and over seeds, without a correction."""
    lines = [
        f"| over `{start}` | seeds | " + " | ".join(PANELS) + " |",
        "|---|---" + "|---" * 3 + "|",
    ]
    rows = {(row["a"], row["reward"]): row for row in summary["comparisons"]}
    for name, system in summary["systems"].items():
        if system["stage"] == "cold_start":
            continue
        cells = []
        for reward in PANELS:
            found = rows[name, reward]
            low, high = found["ci95"]
            cells.append(f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
            if found["seeds_ci95"]:
                cells[-1] += " / [{:+.3f}, {:+.3f}]".format(*found["seeds_ci95"])
        lines.append(f"| `{name}` | {len(found['seeds'])} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=ROOT / "studies" / "paper.yaml")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "data" / "study")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "evidence.svg")
    given = parser.parse_args()
    summary = summarise(load_study(given.study), given.results)
    write_whole(given.results / "study.json", json.dumps(summary, indent=2) + "\n")
    draw(summary, given.figure)
    print(markdown(summary))
    study = load_study(given.study)
    start = "ac_dmd"
    pairs = tuple((name, start) for name in study.rows if name != start)
    print(
        "\n".join(
            gains(summarise(study.model_copy(update={"compare": pairs}), given.results), start)
        )
    )


if __name__ == "__main__":
    main()
