"""A reward with a planted bias, seen at 4 steps and at 50.

The embedded model's stage 2 (`demo_tilt`, 75 rollouts) with its CLIP reward and a bias that nobody
asked for: brightness, at the same weight and at twenty times that. Does the bias show only in the
few steps that the reward has seen, or in the student's samples in 50 steps as well? The student
before and after, on the same prompts and noise, at each number of steps.

    python benchmarks/planted_steps.py --few-step runs/demo/cold_start [--seeds 1]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from support.cells import Cells
from support.students import paired, student_scores
from watch_planted import brightness

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step
from tiltflow.tasks.train import run_training

PLANTED = f"{brightness.__module__}:{brightness.__name__}"
REWARDS = (PLANTED, "clipscore", "clipscore_heldout", "shapes")
STEPS = (4, 50)
WEIGHTS = (1.0, 20.0)
"""Of the planted reward; CLIP's is 1."""
TARGET = 100
"""Out of reach: a sample whose weighted rewards pass the recipe's 3 has no gradient."""


def trained(out: Path, few_step: Path, seed: int, weight: float) -> Path:
    """The run, gone on with where it was stopped."""
    rewards = f"rewards={{clipscore: 1.0, '{PLANTED}': {weight}}}"
    given = [f"run.out={out}", f"model.few_step={few_step}", f"run.seed={seed}", rewards]
    given.append(f"tilt.reward_target={TARGET}")
    cfg = load_config("demo_tilt", [*given, "run.resume=auto", "train.steps=75", "watch.every=75"])
    if latest_step(out) != cfg.train.steps:
        run_training(cfg, Console())
    return out


def scored(run: Path, steps: int, tilt: float, count: int) -> dict[str, list[float]]:
    return student_scores(run, REWARDS, count, steps=steps, tilt=tilt)


def rows(cells: Cells, run: Path, seed: int, weight: float, count: int) -> Iterator[str]:
    """The table's, one a number of steps and a reward; stage 1 is measured once a seed."""
    for steps in STEPS:
        place = f"seed {seed}, {steps} steps"
        before = cells.cell(f"{place}, tilt 0", partial(scored, run, steps, 0, count))
        planted = f"{place}, weight {weight:g}"
        after = cells.cell(planted, partial(scored, run, steps, 1, count))
        for name in REWARDS:
            means = [sum(at[name]) / count for at in (before, after)]
            found = paired(after[name], before[name], count)
            low, high = found.ci95
            yield (
                f"| {seed} | {weight:g} | {steps} | {name.rpartition(':')[2]} | {means[0]:.3f} "
                f"| {means[1]:.3f} | {found.difference:+.3f} [{low:+.3f}, {high:+.3f}] |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--few-step", type=Path, default=Path("runs/demo/cold_start"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("docs/data/planted_steps.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells, table = Cells(args.out, {"count": args.count}), []
    for seed, weight in itertools.product(range(args.seeds), WEIGHTS):
        out = args.runs / f"planted-{weight:g}-seed-{seed}"
        run = trained(out, args.few_step, seed, weight)
        table += rows(cells, run, seed, weight, args.count)
    print("| seed | weight | steps | reward | before | after | difference |\n|" + "---|" * 7)
    print("\n".join(table))


if __name__ == "__main__":
    main()
