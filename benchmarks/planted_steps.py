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
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from support.cells import Cells, spoken
from support.students import student_scores
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
    given += [f"tilt.reward_target={TARGET}", "tilt.reward_steps=3"]  # the recipe's of then
    cfg = load_config("demo_tilt", [*given, "run.resume=auto", "train.steps=75", "watch.every=75"])
    if latest_step(out) != cfg.train.steps:
        run_training(cfg, Console())
    return out


def fill(cells: Cells, runs: Path, few_step: Path, seeds: int, count: int) -> None:
    """Every cell; a run is trained for those that are not there. Stage 1 is scored once a seed."""

    def scored(seed: int, weight: float, steps: int, tilt: float) -> dict[str, list[float]]:
        run = trained(runs / f"planted-{weight:g}-seed-{seed}", few_step, seed, weight)
        return student_scores(run, REWARDS, count, steps=steps, tilt=tilt)

    for seed, weight, steps in itertools.product(range(seeds), WEIGHTS, STEPS):
        place = f"seed {seed}, {steps} steps"
        cells.cell(f"{place}, tilt 0", partial(scored, seed, weight, steps, 0))
        cells.cell(f"{place}, weight {weight:g}", partial(scored, seed, weight, steps, 1))


def means(cells: Cells, steps: int, student: str, reward: str) -> list[float]:
    """A student's mean over the prompts, by seed."""
    place = f", {steps} steps, {student}"
    found = [cell[reward] for name, cell in cells.found.items() if name.endswith(place)]
    return [sum(scores) / len(scores) for scores in found]


def table(cells: Cells) -> None:
    """A row for each weight, number of steps and reward; differences by seed, and over seeds."""
    heads = "weight | steps | reward | before | after, by seed | difference, by seed | over seeds"
    print(f"| {heads} |\n|" + "---|" * 7)
    for weight, steps, reward in itertools.product(WEIGHTS, STEPS, REWARDS):
        before = means(cells, steps, "tilt 0", reward)
        after = means(cells, steps, f"weight {weight:g}", reward)
        changes = [b - a for a, b in zip(before, after, strict=True)]
        each = [", ".join(f"{x:.3f}" for x in after), ", ".join(f"{x:+.3f}" for x in changes)]
        row = [f"{weight:g}", str(steps), reward.rpartition(":")[2], f"{before[0]:.3f}", *each]
        print(f"| {' | '.join([*row, spoken(changes)])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--few-step", type=Path, default=Path("runs/demo/cold_start"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("docs/data/planted_steps.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(args.out, {"count": args.count})
    fill(cells, args.runs, args.few_step, args.seeds, args.count)
    table(cells)


if __name__ == "__main__":
    main()
