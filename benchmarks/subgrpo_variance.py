"""Gradient variance of SubGRPO against full GRPO at equal rollouts (METHOD §5).

Many independent policy gradients of one batch each, with centred advantages, for groups of several
sizes: on the exact velocity of a Gaussian (rewards that add up over the steps' noises, and that do
not), on a stage-1 student of the mixture (reward x₁), and on one of the embedded model (`clipscore`
and the exact checker, `shapes`). For every set of trained steps, the gradient of those steps when
the noises of the other steps are shared within a group (SubGRPO) against when they are independent
(full GRPO): both have the same expectation, so that the ratio of their variances is that of noise
to signal. And whole estimators, scaled to the same expectation, the sum over the K − 1 steps, with
what they cost: network evaluations a sample, forward and backward. The draw of the steps is a part
of their variance that does not fall with the batch.

    python benchmarks/subgrpo_variance.py [--model embedded --few-step RUN] [--repeats 200]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.cells import Cells
from support.mixture import cold_start
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.randomness import Randomness
from tiltflow.method.policy import clipped_surrogate, share_in_groups
from tiltflow.method.rollout import Velocity, attach, log_prob, rollout
from tiltflow.models.backbone import Conditioning
from tiltflow.models.roles import Role
from tiltflow.rewards.base import load_reward
from tiltflow.setup.build import build_stage

STEPS, ETA = 4, 0.9
SETS = [s for size in (1, 2) for s in itertools.combinations(range(STEPS - 1), size)]
BOOTSTRAPS = 2000

Scores = Callable[[Tensor, Sequence[int]], dict[str, Tensor]]
"""The rewards (B,) of samples x₀ of prompts with these numbers."""


@dataclass(frozen=True)
class Problem:
    """A student (its velocity and parameters), its grid, its conditioning of prompts by number,
    and what its samples are scored by."""

    velocity: Velocity
    parameters: list[Tensor]
    sigmas: Tensor
    shape: tuple[int, ...]
    encode: Callable[[Sequence[int]], Conditioning]
    scores: Scores
    batch: int
    groups: Sequence[int]


def of_role(
    role: Role,
    encode: Callable[[Sequence[int]], Conditioning],
    scores: Scores,
    batch: int,
    groups: Sequence[int],
) -> Problem:
    sigmas, shape = role.backbone.few_step_sigmas(STEPS), role.backbone.latent_shape
    parameters = list(role.parameters.values())
    return Problem(role, parameters, sigmas, shape, encode, scores, batch, groups)


def gaussian_problem(dimension: int) -> Problem:
    """The exact velocity of N(0, 1/4 I), and a shift of it by the steps' levels, which is what has
    parameters. Rewards: w·x, which adds up over the steps' noises; w·x > 0; and −|x|²."""
    sigmas = torch.linspace(1, 0, STEPS + 1)
    shifts = torch.zeros(STEPS, dimension, requires_grad=True)

    def velocity(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        t = sigma[:, None]
        step = ((1 - sigma) * STEPS).round().long()
        return x * (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) + shifts[step]

    def scores(x: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        along = x.sum(1) / dimension**0.5
        return {"w·x": along, "w·x > 0": (along > 0).float(), "−|x|²": -x.square().sum(1)}

    def encode(numbers: Sequence[int]) -> Conditioning:
        return Conditioning({}, {})

    return Problem(velocity, [shifts], sigmas, (dimension,), encode, scores, 256, (4, 16))


def mixture_problem(runs: Path) -> Problem:
    cold = cold_start(runs, STEPS, 0)
    build = build_stage(load_config(str(cold / "config.yaml")))
    role = build.stage.roles.generator
    role.load(load_checkpoint(cold).tensors["ema"])
    return of_role(
        role,
        lambda numbers: role.backbone.encode([""] * len(numbers)),
        lambda x, numbers: {"x₁": x[:, 0]},
        256,
        (4, 16),
    )


def embedded_problem(few_step: Path) -> Problem:
    """The tilt's adapter as stage 2 begins: B = 0, so only its gradient with respect to B is not
    0; half of the gradient's elements say nothing, in both arms."""
    options = [f"model.few_step={few_step}", "run.out=runs/unused", "run.device=cpu"]
    build = build_stage(load_config("demo_tilt", options))
    backbone, prompts = build.backbone, build.prompts
    rewards = [load_reward(name) for name in ("clipscore", "shapes")]

    def scores(x: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = [prompts.prompts[i % len(prompts)] for i in numbers]
        images = torch.cat([backbone.decode(part) for part in x.split(16)])
        given = [one.text for one in chosen], [one.metadata for one in chosen]
        return {reward.name: reward(images, *given).float() for reward in rewards}

    return of_role(
        build.stage.roles.generator,
        lambda numbers: prompts.select([i % len(prompts) for i in numbers], backbone.device)[0],
        scores,
        64,
        (4, 8),
    )


def gradients(
    problem: Problem, group: int, repeat: int, trained: tuple[int, ...], share: bool
) -> dict[str, Tensor]:
    """One batch's policy gradient of the trained steps for each reward, all parameters, flat."""
    random, n, sigmas = Randomness(77), problem.batch, problem.sigmas
    first = repeat * (n // group)
    numbers = [first + row // group for row in range(n)]
    cond, shape = problem.encode(numbers), (n, *problem.shape)
    noise = []
    for k in range(STEPS - 1):
        z = random.normal(f"step{k}", repeat, shape)
        noise.append(share_in_groups(z, group) if share and k not in trained else z)
    x = random.normal("init", repeat, shape)
    trajectory = rollout(problem.velocity, x, sigmas, cond, ETA, noise.__getitem__, record=trained)
    with torch.no_grad():
        scores = problem.scores(trajectory.end, numbers)
    now = []
    for k in trained:
        _, mean, std = attach(problem.velocity, trajectory, k)
        now.append(log_prob(trajectory.states[k + 1], mean, std, "gaussian"))
    found = {}
    for number, (name, reward) in enumerate(scores.items(), 1):
        groups = reward.view(-1, group)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten()
        losses = [clipped_surrogate(p, p.detach(), advantages, 1e-5).mean() for p in now]
        kept = number < len(scores)
        total = torch.stack(losses).sum()
        grads = torch.autograd.grad(total, problem.parameters, retain_graph=kept)
        found[name] = torch.cat([g.flatten() for g in grads])
    return found


def spread(
    problem: Problem, group: int, repeats: int, sets: list[tuple[int, ...]], share: bool
) -> dict[str, list[float]]:
    """By reward, each repeat's squared distance to the mean gradient (their mean, by n/(n − 1), is
    the trace of the covariance); of several sets one is drawn for each repeat."""
    order = torch.randint(len(sets), (repeats,), generator=torch.Generator().manual_seed(0))
    scale = (STEPS - 1) / len(sets[0]) if len(sets) > 1 else 1.0
    drawn: dict[str, list[Tensor]] = {}
    for repeat, k in enumerate(order.tolist()):
        for name, g in gradients(problem, group, repeat, sets[k], share).items():
            drawn.setdefault(name, []).append(scale * g)
    found = {}
    for name, rows in drawn.items():
        all_rows = torch.stack(rows)
        off = (all_rows - all_rows.mean(0)).square().sum(1)
        found[name] = [float(f"{v:.4g}") for v in (off * repeats / (repeats - 1)).tolist()]
    return found


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """mean(a) / mean(b), and its bootstrap 95% interval over repeats, the same in both."""
    both = torch.tensor([a, b], dtype=torch.float64)
    rows = torch.randint(len(a), (BOOTSTRAPS, len(a)), generator=torch.Generator().manual_seed(1))
    means = both[:, rows].mean(2)
    low, high = torch.quantile(means[0] / means[1], torch.tensor([0.025, 0.975]).double())
    return float(both[0].mean() / both[1].mean()), float(low), float(high)


def cost(trained: int) -> int:
    """Network evaluations a sample: K forward, and each trained step there and back."""
    return STEPS + 2 * trained


def said(found: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def tables(cells: Cells) -> None:
    found: dict[str, Any] = cells.found
    groups = sorted({int(name.split()[1].rstrip(":")) for name in found})
    rewards = list(next(iter(found.values())))
    print(
        "| reward | group | trained steps | variance, others shared ÷ independent |\n"
        "|---|---|---|---|"
    )
    for reward, group, steps in itertools.product(rewards, groups, SETS):
        pair = [found.get(f"group {group}: {steps}, {arm}") for arm in ("shared", "independent")]
        if pair[0] and pair[1]:
            which = ", ".join(("first", "second", "third")[k] for k in steps)
            said_ratio = said(ratio(pair[0][reward], pair[1][reward]))
            print(f"| {reward} | {group} | {which} | {said_ratio} |")
    print(
        "\n| reward | group | M | variance ÷ that of M = 3 | times evaluations |\n"
        "|---|---|---|---|---|"
    )
    for reward, group in itertools.product(rewards, groups):
        full = found.get(f"group {group}: whole, M = 3")
        for size in (2, 1):
            part = found.get(f"group {group}: whole, M = {size}")
            if full and part:
                value = ratio(part[reward], full[reward])
                priced = tuple(one * cost(size) / cost(STEPS - 1) for one in value)
                print(f"| {reward} | {group} | {size} | {said(value)} | {said(priced)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("gaussian", "mixture", "embedded"), default="gaussian")
    parser.add_argument("--dimension", type=int, default=64, help="of the gaussian")
    parser.add_argument("--batch", type=int, help="samples of a gradient [256; embedded: 64]")
    parser.add_argument("--groups", type=int, nargs="+", help="their sizes")
    parser.add_argument("--few-step", type=Path, default=Path("runs/demo/cold_start"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Problem]] = {
        "gaussian": lambda: gaussian_problem(args.dimension),
        "mixture": lambda: mixture_problem(args.runs),
        "embedded": lambda: embedded_problem(args.few_step),
    }
    problem = makers[args.model]()
    problem = replace(
        problem, batch=args.batch or problem.batch, groups=args.groups or problem.groups
    )
    out = args.out or Path(f"docs/data/subgrpo_{args.model}.json")
    cells = Cells(out, {"repeats": args.repeats, "batch": problem.batch, "shape": problem.shape})
    every = range(STEPS - 1)
    for group in problem.groups:
        measure = partial(spread, problem, group, args.repeats)
        for size in (3, 2, 1):
            drawn = list(itertools.combinations(every, size))
            cells.cell(f"group {group}: whole, M = {size}", partial(measure, drawn, True))
        for steps in SETS:
            for arm in ("shared", "independent"):
                given = partial(measure, [steps], arm == "shared")
                cells.cell(f"group {group}: {steps}, {arm}", given)
    tables(cells)


if __name__ == "__main__":
    main()
