"""Last-step against every-boundary matching on the Gaussian mixture (METHOD §5, `match_steps`).

Stage 1 once, then stage 2 for each learning rate, matching and seed; the student's fitted β, KL
to the exact tilted family and share of samples within three std of a mode, over the rollouts.

    python benchmarks/mixture_tilt.py [--seeds 5] [--rollouts 300]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.core.randomness import Randomness
from tiltflow.method.rollout import rollout
from tiltflow.models.families.mixture import fit_tilt
from tiltflow.models.roles import Role
from tiltflow.setup.build import build_stage
from tiltflow.tasks.train import run_training

matplotlib.use("agg")
RATES = (1e-4, 3e-4, 1e-3)
MATCHINGS = ("last", "all")
DIRECTION = torch.tensor([1.0, 0.0])


def draw(role: Role, n: int = 4096) -> torch.Tensor:
    backbone, random = role.backbone, Randomness(10_000)
    return rollout(
        role,
        random.normal("init", 0, (n, 2)),
        backbone.few_step_sigmas(4),
        backbone.encode([""] * n),
        0.9,
        lambda k: random.normal("noise", k, (n, 2)),
    ).end


def one_run(cold: Path, rate: float, matching: str, seed: int, rollouts: int, every: int) -> list:
    """[rollouts done, β̂, KL, share within 3 std] every `every` rollouts."""
    cfg = load_config(
        "mixture_tilt",
        [
            f"model.few_step={cold}",
            f"train.generator_lr={rate}",
            f"tilt.match_steps={matching}",
            f"run.seed={seed}",
            f"train.steps={rollouts}",
            "train.batch_size=512",
            "tilt.reward_weight=0.13",
        ],
    )
    build = build_stage(cfg)
    mixture, rows = build.backbone.mixture, []  # type: ignore[attr-defined]
    for step in range(rollouts):
        build.stage.iteration(step)
        if (step + 1) % every == 0:
            x = draw(build.stage.roles.ema)
            beta, kl = fit_tilt(x, mixture, DIRECTION)
            rows.append([step + 1, beta, kl, mixture.share_within(x)])
    return rows


def plot(results: list[dict], path: Path) -> None:
    """The curves of every seed, one row a figure and one column a rate, as a vector image."""
    figure, axes = plt.subplots(3, len(RATES), figsize=(9, 7), sharex=True, sharey="row")
    for result in results:
        column = RATES.index(result["rate"])
        colour = {"last": "#c0392b", "all": "#1f5fa8"}[result["matching"]]
        for seed, run in enumerate(result["runs"]):
            rollouts, *series = zip(*run, strict=True)
            label = f"match_steps: {result['matching']}" if seed == 0 else None
            for row, values in enumerate(series):
                axes[row, column].plot(rollouts, values, color=colour, alpha=0.7, label=label)
        axes[0, column].set_title(f"learning rate {result['rate']:.0e}")
        axes[2, column].set_xlabel("rollouts")
    for row, name in enumerate(("fitted β", "KL to the tilted family", "share within 3 std")):
        axes[row, 0].set_ylabel(name)
    axes[1, 0].set_yscale("log")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--cold", type=Path, default=Path("runs/mixture_cold_start"))
    parser.add_argument("--out", type=Path, default=Path("docs/data/mixture_tilt.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/mixture_tilt.svg"))
    parser.add_argument("--plot-only", action="store_true", help="draw the figure of --out")
    args = parser.parse_args()
    if args.plot_only:
        plot(json.loads(args.out.read_text()), args.figure)
        return
    torch.set_num_threads(1)
    if not (args.cold / "checkpoints" / "latest").exists():
        run_training(load_config("mixture_cold_start", [f"run.out={args.cold}"]), Console())
    results = []
    for matching in MATCHINGS:
        for rate in RATES:
            began, runs = time.time(), []
            for seed in range(args.seeds):
                runs.append(one_run(args.cold, rate, matching, seed, args.rollouts, args.every))
            results.append({"matching": matching, "rate": rate, "runs": runs})
            medians = [statistics.median(r[-1][i] for r in runs) for i in (1, 2, 3)]
            print(
                f"{matching:5s} {rate:.0e}: β {medians[0]:.2f} KL {medians[1]:.4f} "
                f"share {medians[2]:.3f} ({time.time() - began:.0f} s)",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results) + "\n")
    plot(results, args.figure)


if __name__ == "__main__":
    main()
