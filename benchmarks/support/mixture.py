"""Students of the Gaussian mixture for K steps, and how far samples are from a known target."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.randomness import Randomness
from tiltflow.method.rollout import Velocity, rollout
from tiltflow.models.families.mixture import GaussianMixture, MixtureBackbone, sliced_wasserstein
from tiltflow.setup.build import Build, build_stage
from tiltflow.tasks.train import run_training

DIRECTION = torch.tensor([1.0, 0.0])
"""r(x) = x₁."""
ETA = 0.9
POINTS, REAL = 16_384, 8
"""Samples of a comparison, and the sets of exact samples that they are compared with."""


def cold_start(runs: Path, steps: int, seed: int) -> Path:
    """Stage 1 by the recipe, for `steps` steps and with the run's seed; gone on with or kept."""
    out = runs / f"steps-{steps}-seed-{seed}"
    there = (out / "checkpoints" / "latest").exists()
    options = [f"sampler.steps={steps}", f"run.seed={seed}", f"run.out={out}", "run.device=cpu"]
    cfg = load_config("mixture_cold_start", [*options, f"run.resume={str(there).lower()}"])
    if not there or load_checkpoint(out).step < cfg.train.steps:
        run_training(cfg, Console(quiet=True))
        if load_checkpoint(out).step < cfg.train.steps:
            raise SystemExit(f"{out} was stopped: the same command goes on")
    return out


def tilt(cold: Path, steps: int, seed: int, *more: str) -> Build:
    """Stage 2 by the recipe, from `cold`; M is at most the K − 1 stochastic steps."""
    policy = [f"tilt.subset={min(2, steps - 1)}"] if steps > 1 else ["tilt.policy_weight=0"]
    options = [f"model.few_step={cold}", f"sampler.steps={steps}", f"run.seed={seed}"]
    options += ["run.out=runs/unused", "run.device=cpu"]
    return build_stage(load_config("mixture_tilt", [*options, *policy, *more]))


def mixture_of(build: Build) -> GaussianMixture:
    assert isinstance(build.backbone, MixtureBackbone)
    return build.backbone.mixture


def sample(velocity: Velocity, steps: int, n: int = POINTS, seed: int = 0) -> Tensor:
    """`n` points (n, 2) of a velocity in `steps` CPS steps; the same noise for the same seed."""
    backbone, random = MixtureBackbone(), Randomness(10_000 + seed)
    return rollout(
        velocity,
        random.normal("init", 0, (n, 2)),
        backbone.few_step_sigmas(steps),
        backbone.encode([""] * n),
        ETA,
        lambda k: random.normal("noise", k, (n, 2)),
    ).end


def real_sets(target: GaussianMixture, n: int = POINTS) -> list[Tensor]:
    """`REAL` sets of `n` exact samples."""
    generator = torch.Generator().manual_seed(1)
    return [target.sample(n, generator) for _ in range(REAL)]


def distance(x: Tensor, real: list[Tensor]) -> float:
    """The sliced Wasserstein distance of `x` to sets of exact samples, their mean."""
    generator = torch.Generator().manual_seed(2)
    return statistics.mean(sliced_wasserstein(x, r, generator=generator) for r in real)


def floor(real: list[Tensor]) -> float:
    """The distance of one set of exact samples to another, the mean of all pairs in turn."""
    generator = torch.Generator().manual_seed(2)
    pairs = itertools.pairwise([*real, real[0]])
    return statistics.mean(sliced_wasserstein(a, b, generator=generator) for a, b in pairs)


def masses_kl(x: Tensor, target: GaussianMixture) -> float:
    """KL(the samples' mode masses ‖ the target's weights), in nats."""
    masses, weights = target.mode_masses(x).double(), target.weights.double()
    return float((torch.xlogy(masses, masses) - masses * weights.log()).sum())
