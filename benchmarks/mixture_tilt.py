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

import torch
from rich.console import Console

from tiltflow.backbones.mixture import fit_tilt
from tiltflow.build import build_stage
from tiltflow.commands.train import run_training
from tiltflow.config import load_config
from tiltflow.randomness import Randomness
from tiltflow.roles import Role
from tiltflow.rollout import rollout

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
    ).states[-1]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--cold", type=Path, default=Path("runs/mixture_cold_start"))
    parser.add_argument("--out", type=Path, default=Path("docs/data/mixture_tilt.json"))
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
