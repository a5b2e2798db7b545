"""The fake score's error along a run, with and without its regulariser, and with fewer updates.

On the Gaussian mixture the velocity that the fake score is a model of can be computed: x_s after
step k is N(m_i, std² I) given the state before the step, so that over 100,000 trajectories of the
student x_t is a mixture of N(a m_i, (a² std² + b²) I) (METHOD §2, §4), whose score, a mean with
self-normalised weights, gives E[v given x_t] by METHOD (1.2). Its Monte-Carlo error is estimated
from the same weights, shown, and subtracted from the squared error.

At each boundary, at five levels t and 64 points of other trajectories of the student: the squared
error of v_φ over the mean ‖E[v given x_t]‖² (`error`); the same of the teacher (`gap`: what the
matching gradient is to see); the consistency loss (METHOD 4.4); and the averaged student's
distance to its target over that of real samples.

- stage 1 by `mixture_cold_start`, 1,000 updates of the generator, from the teacher;
- stage 2 by `mixture_tilt`, 300 rollouts, from stage 1 by the recipe with the same seed;

each with γ = 0 and .01 (published) at the recipe's fake-score updates to one of the generator's
(4, 5) and at one, and with γ = .1 at the recipe's.

    python benchmarks/fake_score_error.py [--seeds 3]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from support.cells import Cells, arguments, interval, save_figure, spoken
from support.mixture import (
    DIRECTION,
    ETA,
    cold_start,
    distance,
    floor,
    mixture_of,
    real_sets,
    sample,
    tilt,
)
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.randomness import Randomness
from tiltflow.flow import cps_mean_std, renoise, renoise_scale
from tiltflow.method.consistency import consistency_loss
from tiltflow.method.rollout import rollout
from tiltflow.models.families.mixture import fit_tilt
from tiltflow.models.roles import Role
from tiltflow.setup.build import Build, build_stage

matplotlib.use("agg")
POPULATION, QUERIES, STEPS = 100_000, 64, 4
PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of t between s + .01 and 1."""
GAMMAS = (0.0, 0.01, 0.1)
UPDATES, ROLLOUTS, LOOKS = 1000, 300, 3


def means_and_states(role: Role, n: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For k = 1..K: the means (n, 2) of step k, its std (0-d) and the states (n, 2) after it."""
    backbone, random = role.backbone, Randomness(20_000 + seed)
    sigmas, cond = backbone.few_step_sigmas(STEPS), backbone.encode([""] * n)
    noise = [random.normal("noise", k, (n, 2)) for k in range(STEPS)]
    x = random.normal("init", 0, (n, 2))
    states = rollout(role, x, sigmas, cond, ETA, noise.__getitem__).states
    found = []
    for k in range(STEPS):
        now, then = sigmas[k].expand(n), sigmas[k + 1].expand(n)
        with torch.no_grad():
            mean, std = cps_mean_std(states[k], role(states[k], now, cond), now, then, ETA)
        found.append((mean.double(), std[0].double().squeeze(), states[k + 1].double()))
    return found


def exact_velocity(
    x: Tensor, t: Tensor, s: Tensor, means: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """E[v given x_t = x] (q, 2) under x_s ~ the mixture of N(mean_i, std² I), and the variance of
    the estimate, summed over the elements: (q,). t and s are 0-d."""
    a, b = (1 - t) / (1 - s), renoise_scale(s, t)
    centres, variance = a * means, (a * std) ** 2 + b**2
    score, spread = [], []
    for rows in x.split(32):
        weights = torch.softmax(-torch.cdist(rows, centres).square() / (2 * variance), dim=1)
        middle = weights @ centres
        squares = weights.square()
        mass = squares.sum(1)
        second = squares @ centres.square().sum(1) - 2 * ((squares @ centres) * middle).sum(1)
        spread.append(second + mass * middle.square().sum(1))
        score.append((middle - rows) / variance)
    factor = t / (1 - t)
    of_score = torch.cat(spread) / variance**2
    return -(x + t * torch.cat(score)) / (1 - t), factor**2 * of_score


def look(build: Build, done: int) -> dict[str, Any]:
    """The figures of one look; errors by boundary, averaged over the levels t."""
    roles, random = build.stage.roles, Randomness(30_000)
    population = means_and_states(roles.generator, POPULATION, 0)
    others = means_and_states(roles.generator, QUERIES, 1)
    sigmas, cond = build.stage.sigmas, build.backbone.encode([""] * QUERIES)
    found: dict[str, list[float]] = {n: [] for n in ("error", "noise", "gap", "consistency")}
    for k, (means, std, _) in enumerate(population, 1):
        sums = dict.fromkeys(found, 0.0)
        s, fake = sigmas[k].double(), roles.fake_score.at(k).field(cond)
        for number, place in enumerate(PLACES):
            t = (s + 0.01 + (0.99 - s) * place).clamp(max=0.98)
            draws = [random.normal(name, 10 * k + number, (QUERIES, 2)) for name in "nab"]
            level = t.float().expand(QUERIES)
            x_t = renoise(others[k - 1][2], s.expand(QUERIES), t.expand(QUERIES), draws[0].double())
            v, variance = exact_velocity(x_t, t, s, means, std)
            with torch.no_grad():
                v_fake = fake(x_t.float(), level)
                v_teacher = roles.teacher(x_t.float(), level, cond)
                delta = 0.001 + 0.199 * random.uniform("delta", 10 * k + number, (QUERIES,))
                t_next, pair = (level - delta).clamp(min=0), (draws[1], draws[2])
                losses = consistency_loss(fake, x_t.float(), level, v_fake, t_next, pair, ETA)
            size, noise = v.square().sum(1).mean(), variance.mean()
            error = (v_fake.double() - v).square().sum(1).mean() - noise
            gap = (v_teacher.double() - v).square().sum(1).mean() - noise
            values = (error / size, noise / size, gap / size, losses.mean())
            for name, value in zip(found, values, strict=True):
                sums[name] += float(value) / len(PLACES)
        for name, total in sums.items():
            found[name].append(total)
    return {"done": done, **found, **quality(build)}


def quality(build: Build) -> dict[str, float]:
    """The averaged student against the target at its own fitted β."""
    x, mixture = sample(build.stage.roles.ema, STEPS), mixture_of(build)
    beta, kl = fit_tilt(x, mixture, DIRECTION)
    real = real_sets(mixture.tilted(DIRECTION, beta))
    ratio = distance(x, real) / floor(real)
    return {"beta": beta, "kl": kl, "share": mixture.share_within(x), "ratio": ratio}


def followed(build: Build, iterations: int) -> list[dict[str, Any]]:
    """A run with `LOOKS` looks at equal distances."""
    looks, ends = [], {iterations * n // LOOKS for n in range(1, LOOKS + 1)}
    for done in range(1, iterations + 1):
        build.stage.iteration(done - 1)
        build.stage.guard.failures()
        if done in ends:
            looks.append(look(build, done))
    return looks


def stage_1(gamma: float, every: int, seed: int) -> list[dict[str, Any]]:
    options = [f"cold_start.generator_every={every}", f"train.steps={UPDATES * every}"]
    options += [f"cold_start.consistency={gamma}", f"run.seed={seed}", "run.device=cpu"]
    build = build_stage(load_config("mixture_cold_start", [*options, "run.out=runs/unused"]))
    return followed(build, UPDATES * every)


def stage_2(runs: Path, gamma: float, updates: int, seed: int) -> list[dict[str, Any]]:
    options = (f"tilt.consistency={gamma}", f"tilt.fake_score_updates={updates}")
    return followed(tilt(cold_start(runs, STEPS, seed), STEPS, seed, *options), ROLLOUTS)


def arms() -> Sequence[tuple[str, int, float]]:
    """(stage, fake-score updates to one of the generator's, γ)."""
    return [
        (stage, updates, gamma)
        for stage, usual in (("stage 2", 5), ("stage 1", 4))
        for gamma, updates in itertools.product(GAMMAS, (usual, 1))
        if updates == usual or gamma < GAMMAS[-1]
    ]


def cell_name(stage: str, updates: int, gamma: float, seed: int) -> str:
    return f"{stage}, updates {updates}, gamma {gamma:g}, seed {seed}"


def runs_of(cells: Cells, arm: tuple[str, int, float]) -> list[list[dict[str, Any]]]:
    """The looks of each seed that is done."""
    start = cell_name(*arm, 0).removesuffix("0")
    return [cell for name, cell in cells.found.items() if name.startswith(start)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(cells: Cells) -> None:
    print(
        "| stage | updates | γ | seeds | error | of it Monte Carlo | gap | error ÷ gap "
        "| consistency | β̂ | distance ÷ real |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for arm in arms():
        last = [looks[-1] for looks in runs_of(cells, arm)]
        if not last:
            continue
        row = [spoken([mean(one[n]) for one in last], 4) for n in ("error", "noise", "gap")]
        row.append(spoken([mean(one["error"]) / mean(one["gap"]) for one in last], 2))
        row.append(spoken([mean(one["consistency"]) for one in last], 4))
        row += [spoken([one[n] for one in last], 2) for n in ("beta", "ratio")]
        print(f"| {arm[0]} | {arm[1]} | {arm[2]:g} | {len(last)} | " + " | ".join(row) + " |")


def contrasts(cells: Cells) -> None:
    """The error at the end less that of the arm it is compared with, by seed, over seeds."""
    print("\n| stage | arm | less | error |\n|---|---|---|---|")
    for stage, usual in (("stage 1", 4), ("stage 2", 5)):
        plain = (stage, usual, 0.0)
        pairs = [((stage, usual, gamma), plain) for gamma in GAMMAS[1:]]
        pairs += [((stage, 1, 0.0), plain), ((stage, 1, GAMMAS[1]), (stage, 1, 0.0))]
        for arm, other in pairs:
            both = zip(runs_of(cells, arm), runs_of(cells, other), strict=True)
            found = [mean(a[-1]["error"]) - mean(b[-1]["error"]) for a, b in both]
            if found:
                words = [f"γ = {gamma:g}, updates {n}" for _, n, gamma in (arm, other)]
                print(f"| {stage} | {' | '.join(words)} | {spoken(found, 4)} |")


def plot(cells: Cells, path: Path) -> None:
    """The error over the run, the mean over seeds with its interval, one panel a stage."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    colours = dict(zip(GAMMAS, ("#c0392b", "#1f5fa8", "#2e8b57"), strict=True))
    for stage, updates, gamma in arms():
        runs = runs_of(cells, (stage, updates, gamma))
        if not runs:
            continue
        at = [one["done"] / (updates if stage == "stage 1" else 1) for one in runs[0]]
        points = [interval([mean(run[i]["error"]) for run in runs]) for i in range(len(at))]
        middle, low, high = zip(*points, strict=True)
        axis, style = axes[int(stage == "stage 2")], "--" if updates == 1 else "-"
        label = f"γ = {gamma:g}, {updates} update{'s' if updates > 1 else ''}"
        axis.plot(at, middle, style, color=colours[gamma], marker="o", label=label)
        axis.fill_between(at, low, high, color=colours[gamma], alpha=0.12)
    for axis, title in zip(axes, ("stage 1", "stage 2"), strict=True):
        axis.set(title=title, xlabel="updates of the generator", ylabel="relative squared error")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = arguments("fake_score_error", __doc__, 3)
    settings = {"population": POPULATION, "queries": QUERIES, "places": PLACES, "looks": LOOKS}
    cells = Cells(args.out, settings | {"updates": UPDATES, "rollouts": ROLLOUTS})
    for seed in range(args.seeds):
        for stage, updates, gamma in arms():
            make = partial(stage_1, gamma, updates, seed)
            if stage == "stage 2":
                make = partial(stage_2, args.runs, gamma, updates, seed)
            cells.cell(cell_name(stage, updates, gamma, seed), make)
    table(cells)
    contrasts(cells)
    plot(cells, args.figure)


if __name__ == "__main__":
    main()
