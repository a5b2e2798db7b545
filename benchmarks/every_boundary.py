"""Matching every boundary at ten times the rate, on the mixture, and what that costs.

The recipes `mixture_cold_start` and `mixture_tilt` (METHOD §5, `match_steps`), 600 rollouts, each
seed from a stage 1 of its own. The published form matches the last step; 1e-4 is the rate at which
it holds on the mixture (docs/lab/evidence.md), and 1e-3 ten times that. Every arm: fitted β, KL to
that tilt and share of samples within three std of a mode, of 16,384 samples of the averaged
student every 50 rollouts; CPU seconds of the rollouts, and network evaluations of one.

    python benchmarks/every_boundary.py [--seeds 5]
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

from support.cells import Cells, arguments, spoken
from support.mixture import DIRECTION, POINTS, cold_start, mixture_of, sample, tilt

from tiltflow.config.load import load_config
from tiltflow.models.families.mixture import fit_tilt
from tiltflow.setup.costing import costs

ARMS = (("all", 1e-3), ("last", 1e-4), ("last", 1e-3))
ROLLOUTS, EVERY, STEPS = 600, 50, 4


def one_run(runs: Path, matching: str, rate: float, seed: int) -> dict[str, Any]:
    options = (f"tilt.match_steps={matching}", f"train.generator_lr={rate}")
    build = tilt(cold_start(runs, STEPS, seed), STEPS, seed, *options)
    mixture, looks, seconds = mixture_of(build), [], 0.0
    for done in range(1, ROLLOUTS + 1):
        began = time.process_time()
        build.stage.iteration(done - 1)
        build.stage.guard.failures()
        seconds += time.process_time() - began
        if done % EVERY == 0:
            x = sample(build.stage.roles.ema, STEPS)
            looks.append([done, *fit_tilt(x, mixture, DIRECTION), mixture.share_within(x)])
    return {"looks": looks, "cpu_seconds": seconds}


def evaluations(matching: str, rollouts: int) -> float:
    """Network evaluations of a rollout, the mean of the first `rollouts`."""
    options = ["model.few_step=runs/unused", f"tilt.match_steps={matching}"]
    counted = itertools.islice(costs(load_config("mixture_tilt", options)), rollouts)
    return sum(cost.evaluations for cost in counted) / rollouts


def table(cells: Cells) -> None:
    print("| matching | rate | seeds | β̂ | KL | share | CPU s a rollout | evaluations a rollout |")
    print("|---|---|---|---|---|---|---|---|")
    for matching, rate in ARMS:
        start = f"{matching}, rate {rate:g}, seed "
        runs = [cell for name, cell in cells.found.items() if name.startswith(start)]
        if not runs:
            continue
        last = [run["looks"][-1] for run in runs]
        row = [spoken([one[i] for one in last], d) for i, d in ((1, 2), (2, 4), (3, 3))]
        row += [spoken([run["cpu_seconds"] / ROLLOUTS for run in runs])]
        cost = cells.found[f"evaluations, {matching}"]
        print(f"| {matching} | {rate:g} | {len(runs)} | " + " | ".join(row) + f" | {cost:,.0f} |")


def main() -> None:
    args = arguments("every_boundary", __doc__, 5, figure=False)
    cells = Cells(args.out, {"rollouts": ROLLOUTS, "look_every": EVERY, "points": POINTS})
    for matching in ("all", "last"):
        cells.cell(f"evaluations, {matching}", partial(evaluations, matching, 20))
    for matching, rate in ARMS:
        for seed in range(args.seeds):
            name = f"{matching}, rate {rate:g}, seed {seed}"
            cells.cell(name, partial(one_run, args.runs, matching, rate, seed))
    table(cells)


if __name__ == "__main__":
    main()
