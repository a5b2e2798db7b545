"""One student for several numbers of steps: quality against network evaluations of a sample.

The students are those of `studies/steps.yaml`, whose results this reads. Beside them the teacher of
the embedded model, with guidance (two evaluations a step) on its own grid, on the same prompts and
noise: scored here, and kept in `--out`.

    tiltflow study studies/steps.yaml --out docs/data/steps
    python benchmarks/step_counts.py              the teacher's curve, the table and the figure
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from support.cells import Cells, arguments, save_figure

from tiltflow.evaluation.diversity import features_of
from tiltflow.evaluation.scores import Diversity, evaluate_systems
from tiltflow.tasks.evaluate import load_rewards
from tiltflow.tasks.request import Request, prepare
from tiltflow.tasks.study_file import Study, load_study
from tiltflow.tasks.study_table import markdown, summarise

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
TEACHER_STEPS = (1, 2, 4, 8, 25, 50)
PANELS = {
    "shapes": "shapes: the exact checker",
    "clipscore_heldout": "clipscore_heldout",
    "vendi": "diversity (Vendi score)",
}
ROWS = {
    "one_step": "trained for 1 step",
    "two_steps": "trained for 2",
    "four_steps": "trained for 4",
    "eight_steps": "trained for 8",
    "all": "trained for all four",
    "all_sum": "all four, on four times the evaluations",
}
TRAINED = {"one_step": "1", "two_steps": "2", "four_steps": "4", "eight_steps": "8"}


def teacher(study: Study, steps: int) -> dict[str, Any]:
    """The guided teacher's means with intervals over prompts, and its evaluations a sample."""
    request = Request(
        "packaged:pipeline",
        study.scored(),
        teacher_steps=steps,
        seed=study.noise,
        batch=study.batch,
        device="cpu",
        autocast="auto",
        rewards=dict.fromkeys(study.rewards),
    )
    loaded, sampler = prepare(request)
    system, rewards = sampler.systems(loaded)[0], load_rewards(request.rewards, "cpu")
    features = features_of(loaded.backbone.medium, rewards)
    assert features is not None
    found = evaluate_systems(
        [system], request.prompts, rewards, request.batch, diversity=Diversity(features)
    )
    kept: dict[str, Any] = found.summary["systems"][system.name]
    return kept


def score(system: Mapping[str, Any], panel: str) -> tuple[float, list[float]]:
    """A system's mean and interval in a panel."""
    found = system["vendi"] if panel == "vendi" else system["scores"][panel]
    return found["mean"], found["ci95"]


def curve(axes: Any, systems: list[Mapping[str, Any]], panel: str, **style: Any) -> None:
    """The systems' means over their evaluations, with their intervals."""
    places = [system["nfe"] for system in systems]
    found = [score(system, panel) for system in systems]
    low, high = ([abs(mean - ends[i]) for mean, ends in found] for i in (0, 1))
    axes.errorbar(
        places, [mean for mean, _ in found], yerr=[low, high], markersize=4, capsize=2, **style
    )


def draw(summary: Mapping[str, Any], curves: Mapping[str, Any], path: Path) -> None:
    """A panel a score: lines are the teacher and the students of all numbers; a student of one
    number is a disc there, and a thin line at the others."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 4))
    colours = dict(zip(ROWS, plt.get_cmap("tab10").colors, strict=False))
    for axes, (panel, title) in zip(panels, PANELS.items(), strict=True):
        curve(axes, list(curves.values()), panel, color="#777777", fmt="s--", label="teacher")
        for row, label in ROWS.items():
            systems = [s for name, s in summary["systems"].items() if name.startswith(f"{row}@")]
            whole = row.startswith("all")
            style = {"fmt": "o-" if whole else "x:", "linewidth": 1.8 if whole else 0.8}
            if systems:
                curve(axes, systems, panel, color=colours[row], label=label, **style)
            own = summary["systems"].get(f"{row}@{TRAINED.get(row)}")
            if own is not None:
                axes.plot(own["nfe"], score(own, panel)[0], "o", color=colours[row], markersize=7)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16, 50, 100], ["1", "2", "4", "8", "16", "50", "100"])
        axes.set_xlabel("network evaluations a sample", fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(loc="upper right", fontsize=7, frameon=False)
    save_figure(figure, path)


def teacher_table(curves: Mapping[str, Any]) -> list[str]:
    """The teacher's rows, as those of the study's table."""
    lines = ["| teacher's steps | evaluations | shapes | clipscore | clipscore_heldout | vendi |"]
    lines.append("|---|---|---|---|---|---|")
    for steps, (_, system) in zip(TEACHER_STEPS, curves.items(), strict=False):
        cells = []
        for name in ("shapes", "clipscore", "clipscore_heldout"):
            mean, (low, high) = score(system, name)
            cells.append(f"{mean:.3f} ± {(high - low) / 2:.3f}")
        vendi = system["vendi"]["mean"]
        lines.append(f"| {steps} | {system['nfe']} | {' | '.join(cells)} | {vendi:.3f} |")
    return lines


def main() -> None:
    args = arguments("step_counts", __doc__, 1)
    study = load_study(ROOT / "studies" / "steps.yaml")
    settings = study.model_dump(mode="json", include={"prompts", "count", "noise", "rewards"})
    cells = Cells(args.out, settings)
    for steps in TEACHER_STEPS:
        cells.cell(f"teacher, {steps}", partial(teacher, study, steps))
    summary = summarise(study, ROOT / "docs" / "data" / "steps")
    draw(summary, cells.found, args.figure)
    print(markdown(summary))
    print("\n".join(teacher_table(cells.found)))


if __name__ == "__main__":
    main()
