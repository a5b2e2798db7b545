"""The tables and the figure of docs/evidence.md from the results that docs/data/study keeps.

python scripts/evidence_figure.py            prints the tables and draws the figure
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from tiltflow.core.disk import write_whole
from tiltflow.core.sentences import counted
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.study_table import markdown, summarise

matplotlib.use("agg")
matplotlib.rcParams["svg.hashsalt"] = "evidence"  # the same bytes for the same figure
ROOT = Path(__file__).parents[1]
PANELS = {
    "shapes": "shapes: the exact checker, never trained on",
    "clipscore": "clipscore: what stage 2 trains on",
    "clipscore_heldout": "clipscore_heldout: another CLIP, never trained on",
}


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """A panel a reward: each row's mean with its 95% interval over prompts, stage 1 in grey. A
    stage-2 row has a grey mark at the mean of the stage 1 that it started from, on its own seeds:
    rows have different ones."""
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
            if systems[name]["stage"] == "tilt":
                axes.plot(started(systems, name, reward), at, "|", color="#777777", markersize=11)
        axes.set_title(title, fontsize=9)
        labels = [f"{name} ({counted(len(systems[name]['seeds']), 'seed')})" for name in names]
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def started(systems: Mapping[str, Any], name: str, reward: str) -> float:
    """The mean of stage 1 on the seeds of a row."""
    by_seed = systems["ac_dmd"]["scores"][reward]["by_seed"]
    return sum(by_seed[str(seed)] for seed in systems[name]["seeds"]) / len(systems[name]["seeds"])


def differences(
    summary: Mapping[str, Any], other: str, p: bool = False, stage: str | None = None
) -> list[str]:
    """Each row (of one stage, where it is given) less `other`, paired: the difference with its
    interval over prompts and, of several seeds, over seeds; with `p`, Holm's corrected p of
    `shapes`, over prompts."""
    head = [f"less `{other}`", "seeds", *PANELS, *(["p of shapes"] if p else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows = {(row["a"], row["reward"]): row for row in summary["comparisons"]}
    for name, system in summary["systems"].items():
        if (name, "shapes") not in rows or stage not in (None, system["stage"]):
            continue
        found = [rows[name, reward] for reward in PANELS]
        line = [f"`{name}`", str(len(found[0]["seeds"])), *map(_difference, found)]
        line += [f"{found[0]['p_holm']:.2g}"] if p else []
        lines.append("| " + " | ".join(line) + " |")
    return lines


def _difference(found: Mapping[str, Any]) -> str:
    text = f"{found['difference']:+.3f} {_interval(found['ci95'])}"
    return f"{text} / {_interval(found['seeds_ci95'])}" if found["seeds_ci95"] else text


def _interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:+.3f}, {ends[1]:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=ROOT / "studies" / "paper.yaml")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "data" / "study")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "evidence.svg")
    given = parser.parse_args()
    study = load_study(given.study)
    assert study.reference is not None
    summary = summarise(study, given.results)
    kept = given.results / f"{given.study.stem}.json"
    write_whole(kept, json.dumps(summary, indent=2) + "\n")
    draw(summary, given.figure)
    print(markdown(summary) + "\n")
    print("\n".join(differences(summary, study.reference, p=True)) + "\n")
    pairs = tuple((name, "ac_dmd") for name in study.rows if name != "ac_dmd")
    over_start = summarise(study.model_copy(update={"compare": pairs}), given.results)
    for stage in ("cold_start", "tilt"):
        print("\n".join(differences(over_start, "ac_dmd", stage=stage)) + "\n")


if __name__ == "__main__":
    main()
