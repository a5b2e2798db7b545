"""Gradient variance of SubGRPO against full GRPO at equal rollouts (METHOD §5).

On the mixture's stage-1 student with the reward x₁: many independent policy gradients of one batch
each. Both estimators are scaled to the same expectation, the sum over the K − 1 stochastic steps:
full GRPO trains every step of a rollout whose noises are all independent; SubGRPO trains M of them,
shares the other noises within a group, and is scaled by (K − 1)/M.

    python benchmarks/subgrpo_variance.py [--repeats 300]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tiltflow.build import build_stage
from tiltflow.checkpoint import load_checkpoint
from tiltflow.commands.train import run_training
from tiltflow.config import load_config
from tiltflow.objectives.policy import (
    choose_steps,
    clipped_surrogate,
    group_advantages,
    share_in_groups,
)
from tiltflow.randomness import Randomness
from tiltflow.roles import Role
from tiltflow.rollout import attach, log_prob, rollout

GROUP, BATCH, STEPS = 16, 256, 4


def gradient(role: Role, repeat: int, subset: int, standardise: bool) -> Tensor:
    """One batch's policy gradient with respect to all parameters, flattened."""
    random, last = Randomness(77), STEPS - 1
    trained = choose_steps(random.permutation("subset", repeat, last), subset)
    noise = []
    for k in range(last):
        z = random.normal(f"step{k}", repeat, (BATCH, 2))
        noise.append(z if k in trained else share_in_groups(z, GROUP))
    x = random.normal("init", repeat, (BATCH, 2))
    cond, sigmas = role.backbone.encode([""] * BATCH), role.backbone.few_step_sigmas(STEPS)
    trajectory = rollout(role, x, sigmas, cond, 0.9, noise.__getitem__, record=trained)
    reward = trajectory.states[-1][:, 0]
    groups = reward.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    if standardise:
        advantages, _ = group_advantages({"r": reward}, {"r": 1.0}, GROUP)
    total = torch.zeros(())
    for k in trained:
        _, mean, std = attach(role, trajectory, k)
        now = log_prob(trajectory.states[k + 1], mean, std, "gaussian")
        total = total + clipped_surrogate(now, now.detach(), advantages, 1e-5).mean()
    found = torch.autograd.grad(last / subset * total, list(role.parameters.values()))
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
    print("advantages    M  |mean|     trace of covariance  noise-to-signal")
    for standardise in (False, True):
        for subset in (3, 2, 1):
            g = torch.stack(
                [gradient(roles.generator, i, subset, standardise) for i in range(args.repeats)]
            )
            trace = float(g.var(0).sum())
            # the mean's own sampling noise is taken off its square
            signal = max(float(g.mean(0).square().sum()) - trace / args.repeats, 0.0)
            kind = "standardised" if standardise else "centred"
            noise = trace / signal if signal else float("inf")
            print(
                f"{kind:12s}  {subset}  {signal**0.5:9.4f}  {trace:19.4f}  {noise:15.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
