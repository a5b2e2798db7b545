"""tiltflow from Python: train with a callback, look at the run, sample, evaluate, compare.

Stage 1 runs on the closed-form mixture, which takes seconds. With a pipeline's directory in its
place the same calls make images.

    python python_api.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import tiltflow


class Loss(tiltflow.Callbacks):
    """Prints one of the metrics, and what was saved."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "generator/matching" in values:  # not where the generator had no update since
            print(f"step {step}: matching loss {values['generator/matching']:.3f}")

    def checkpoint(self, step: int, path: Path) -> None:
        print(f"saved {path.name}")


def main(folder: Path) -> None:
    config = tiltflow.load_recipe(
        "mixture_cold_start",
        train={"steps": 200, "batch_size": 128},
        log={"every": 50},
        run={"out": folder / "mixture", "device": "cpu"},
    )
    run = tiltflow.train(config, Loss())
    print(f"{run.path} is at step {run.step}, finished: {run.finished}")

    prompts = [""] * 500  # the mixture has no prompts: these are 500 points
    points = tiltflow.sample("mixture", prompts, few_step=run.path, device="cpu")
    print(f"points {points.shape}, distance from the centre {np.hypot(*points.T).mean():.2f}")

    figures = folder / "evaluation.json"
    tiltflow.evaluate("mixture", prompts, ["linear"], few_step=run.path, device="cpu", out=figures)
    for row in tiltflow.compare(figures, systems=("ac_dmd", "teacher")):
        low, high = row["ci95"]
        print(f"{row['a']} − {row['b']} on {row['reward']}: [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/python_api"))
