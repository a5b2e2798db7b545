"""Gradient variance of SubGRPO against full GRPO at equal rollouts (METHOD §5).

On the mixture's stage-1 student with the reward x₁: many independent policy gradients of one batch
each, with centred advantages. For every set of trained steps, the gradient of those steps when the
noises of the other steps are shared within a group (SubGRPO) against when they are independent
(full GRPO); and whole estimators, scaled to the same expectation, the sum over the K − 1 steps.

    python benchmarks/subgrpo_variance.py [--repeats 300]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.randomness import Randomness
from tiltflow.method.policy import clipped_surrogate, share_in_groups
from tiltflow.method.rollout import attach, log_prob, rollout
from tiltflow.models.roles import Role
from tiltflow.setup.build import build_stage
from tiltflow.tasks.train import run_training

GROUP, BATCH, STEPS = 16, 256, 4


def gradient(role: Role, repeat: int, trained: tuple[int, ...], share: bool) -> Tensor:
    """One batch's policy gradient of the trained steps, all parameters, flattened."""
    random, last = Randomness(77), STEPS - 1
    noise = []
    for k in range(last):
        z = random.normal(f"step{k}", repeat, (BATCH, 2))
        noise.append(share_in_groups(z, GROUP) if share and k not in trained else z)
    x = random.normal("init", repeat, (BATCH, 2))
    cond, sigmas = role.backbone.encode([""] * BATCH), role.backbone.few_step_sigmas(STEPS)
    trajectory = rollout(role, x, sigmas, cond, 0.9, noise.__getitem__, record=trained)
    reward = trajectory.end[:, 0]
    groups = reward.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    total = torch.zeros(())
    for k in trained:
        _, mean, std = attach(role, trajectory, k)
        now = log_prob(trajectory.states[k + 1], mean, std, "gaussian")
        total = total + clipped_surrogate(now, now.detach(), advantages, 1e-5).mean()
    found = torch.autograd.grad(total, list(role.parameters.values()))
    return torch.cat([g.flatten() for g in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--cold", type=Path, default=Path("runs/mixture_cold_start"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (args.cold / "checkpoints" / "latest").exists():
        run_training(load_config("mixture_cold_start", [f"run.out={args.cold}"]), Console())
    build = build_stage(load_config(str(args.cold / "config.yaml")))
    roles = build.stage.roles
    roles.generator.load(load_checkpoint(args.cold).tensors["ema"])
    generator = roles.generator

    def trace(sets: list[tuple[int, ...]], share: bool) -> tuple[float, float]:
        """Trace of the covariance and |mean| over repeats; the sets take turns at random."""
        order = torch.randint(
            len(sets), (args.repeats,), generator=torch.Generator().manual_seed(0)
        )
        scale = (STEPS - 1) / len(sets[0]) if len(sets) > 1 else 1.0
        g = torch.stack(
            [scale * gradient(generator, i, sets[int(k)], share) for i, k in enumerate(order)]
        )
        return float(g.var(0).sum()), float(g.mean(0).norm())

    every = range(STEPS - 1)
    print("trained steps   variance: others shared / others independent   ratio")
    for size in (1, 2):
        for steps in itertools.combinations(every, size):
            shared, _ = trace([steps], True)
            independent, _ = trace([steps], False)
            print(
                f"{steps!s:12s}  {shared:10.4f} / {independent:10.4f}   {shared / independent:.2f}"
            )
    print("whole estimator    variance   |mean|")
    for size in (3, 2, 1):
        variance, mean = trace(list(itertools.combinations(every, size)), True)
        print(f"M = {size}            {variance:10.4f}  {mean:7.3f}", flush=True)


if __name__ == "__main__":
    main()
