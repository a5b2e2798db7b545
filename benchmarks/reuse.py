"""Does stage 1 lose quality when one rollout serves several iterations (`cold_start.reuse`)?

On the mixture, where the answer is known: the sliced Wasserstein distance to the teacher over that
of two real samples (1 is perfect), and the share of samples within three standard deviations of a
mode. With `--shapes N` also N iterations of the demo's recipe, and the exact checker's verdict on
held-out prompts. The time is that of the iterations.

    python benchmarks/reuse.py [--steps 2000] [--seeds 1] [--shapes 280]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

import torch
from support.stages import model
from support.tables import report

from tiltflow.config.load import load_config
from tiltflow.core.randomness import Randomness
from tiltflow.method.sampling import sample_few_step
from tiltflow.models.families.mixture import MixtureBackbone, sliced_wasserstein
from tiltflow.rewards.zoo.shapes import ShapesReward
from tiltflow.setup.build import Build, build_stage

SAMPLES = 8192


def train(build: Build, steps: int) -> float:
    """CPU seconds of the iterations; they must all have counted."""
    began = time.process_time()
    for step in range(steps):
        build.stage.iteration(step)
    took = time.process_time() - began
    for error in build.stage.guard.failures():
        raise error
    return took


@torch.no_grad()
def of_mixture(build: Build) -> tuple[float, float]:
    """Distance to the teacher over that of real samples, and the share near a mode."""
    backbone = build.backbone
    assert isinstance(backbone, MixtureBackbone)
    cond, numbers = backbone.encode([""] * SAMPLES), range(SAMPLES)
    grid = backbone.few_step_sigmas(4)
    x = sample_few_step(build.stage.roles.ema, cond, numbers, Randomness(10_000), grid, 0.9)
    generator = torch.Generator().manual_seed(1)
    real = [backbone.mixture.sample(SAMPLES, generator) for _ in range(9)]
    found = sum(sliced_wasserstein(x, r, generator=generator) for r in real) / 9
    pairs = itertools.pairwise(real)
    floor = sum(sliced_wasserstein(a, b, generator=generator) for a, b in pairs) / 8
    return found / floor, backbone.mixture.share_within(x)


@torch.no_grad()
def of_shapes(build: Build) -> tuple[float, float]:
    """The share of held-out images that are exactly right, and its standard error."""
    backbone, checker, fixed = build.backbone, ShapesReward(), build.fixed
    assert fixed is not None
    grid, scores = backbone.few_step_sigmas(4), []
    for start in range(0, len(fixed), 32):
        numbers = range(start, min(start + 32, len(fixed)))
        cond, part = fixed.select(numbers, backbone.device)
        x = sample_few_step(build.stage.roles.ema, cond, numbers, Randomness(10_000), grid, 0.9)
        texts, metadata = [p.text for p in part], [p.metadata for p in part]
        scores.append(checker(backbone.decode(x), texts, metadata))
    mean = float(torch.cat(scores).mean())
    return mean, math.sqrt(mean * (1 - mean) / len(fixed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shapes", type=int, default=0, help="iterations of the demo's stage 1")
    args = parser.parse_args()
    rows = []
    for seed, reuse in itertools.product(range(args.seeds), (1, 2, 4)):
        options = [f"train.steps={args.steps}", f"cold_start.reuse={reuse}", f"run.seed={seed}"]
        cfg = load_config("mixture_cold_start", [*options, "run.device=cpu", "run.out=unused"])
        build = build_stage(cfg)
        milliseconds = 1000 * train(build, args.steps) / args.steps
        distance, share = of_mixture(build)
        rows.append(["mixture", reuse, seed, args.steps, milliseconds, distance, share])
        print(rows[-1], flush=True)
    with model() as made:
        for reuse in (1, 2) if args.shapes else ():
            options = [f"train.steps={args.shapes}", f"cold_start.reuse={reuse}"]
            options += ["log.samples_every=1000000", "log.samples=192"]  # the prompts of `fixed`
            build = build_stage(made.config("cold_start", *options))
            milliseconds = 1000 * train(build, args.shapes) / args.shapes
            score, error = of_shapes(build)
            rows.append(["shapes", reuse, 0, args.shapes, milliseconds, score, error])
            print(rows[-1], flush=True)
    columns = ["run", "reuse", "seed", "iterations", "an iteration, CPU ms"]
    columns += ["distance ÷ real (shapes: exactly right)", "share near a mode (shapes: its error)"]
    report("reuse", columns, rows)


if __name__ == "__main__":
    main()
