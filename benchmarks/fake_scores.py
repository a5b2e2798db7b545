"""One fake score for all boundaries against one for each (`train.fake_scores`), and the weight of a
boundary (`train.boundary_power`), on the Gaussian mixture.

Stage 1 by the recipe `mixture_cold_start` for each choice and seed: the sliced Wasserstein distance
of 16,384 4-step samples to the teacher's distribution over that of two real samples of that size,
and the share of samples within three std of a mode.

    python benchmarks/fake_scores.py [--seeds 3] [--steps 8000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch
from mixture_tilt import draw

from tiltflow.config.load import load_config
from tiltflow.models.families.mixture import MixtureBackbone, sliced_wasserstein
from tiltflow.setup.build import build_stage

CHOICES = tuple(itertools.product(("shared", "per_boundary"), (0.0, 1.0)))
POINTS = 16_384


def one_run(kind: str, power: float, seed: int, steps: int) -> tuple[float, float]:
    """(distance over that of real samples, share within 3 std) after `steps` iterations."""
    options = [
        f"train.fake_scores={kind}",
        f"train.boundary_power={power}",
        f"train.steps={steps}",
        f"run.seed={seed}",
        "run.out=runs/unused",
        "run.device=cpu",
    ]
    build = build_stage(load_config("mixture_cold_start", options))
    for step in range(steps):
        build.stage.iteration(step)
        build.stage.guard.failures()
    backbone = build.backbone
    assert isinstance(backbone, MixtureBackbone)
    x = draw(build.stage.roles.ema, POINTS)
    generator = torch.Generator().manual_seed(1)
    real = [backbone.mixture.sample(POINTS, generator) for _ in range(9)]
    found = [sliced_wasserstein(x, r, generator=generator) for r in real]
    floor = [sliced_wasserstein(a, b, generator=generator) for a, b in itertools.pairwise(real)]
    ratio = statistics.mean(found) / statistics.mean(floor)
    return ratio, backbone.mixture.share_within(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("docs/data/fake_scores.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed, (kind, power) in itertools.product(range(args.seeds), CHOICES):
        name = f"{kind}, boundary_power {power:g}"
        rows.setdefault(name, []).append(one_run(kind, power, seed, args.steps))
        ratio, share = rows[name][-1]
        print(f"seed {seed}  {name}: distance {ratio:.2f}, share {share:.3f}", flush=True)
        args.out.write_text(json.dumps({"steps": args.steps, "runs": rows}, indent=1) + "\n")
    print("\n| fake scores | distance / real samples' | share within 3 std |\n|---|---|---|")
    for name, runs in rows.items():
        ratios, shares = zip(*runs, strict=True)
        print(
            f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
            f"| {statistics.median(shares):.3f} ({min(shares):.3f}-{max(shares):.3f}) |"
        )


if __name__ == "__main__":
    main()
