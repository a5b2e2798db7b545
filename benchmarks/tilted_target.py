"""The tilted target in few steps, where it is known: how near a student comes to p exp(β r) / Z.

On the Gaussian mixture with r(x) = x₁, for K = 1, 2, 4 and 8 steps and at stated β:

- rtdmd: both stages by the recipes `mixture_cold_start` and `mixture_tilt`, each with the seed; the
  averaged student at the first look, every 10 rollouts up to 600, at which its fitted β has
  reached the stated one. (β = 0: after stage 1.)
- exact: the exact velocity of the tilted target in K CPS steps.
- fitted: the same network, from where stage 1 starts, as a K-step generator fitted to exact samples
  of the target: their sliced Wasserstein distance, squared, back through all K steps.
- real: two sets of exact samples.

Each: the sliced Wasserstein distance of 16,384 samples to 8 sets of exact ones (the mean over
them), and KL(mode masses ‖ exact weights).

    python benchmarks/tilted_target.py [--seeds 3]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
    POINTS,
    cold_start,
    distance,
    floor,
    masses_kl,
    mixture_of,
    real_sets,
    sample,
    tilt,
)
from torch import Tensor, nn

from tiltflow.method.rollout import step
from tiltflow.models.families.mixture import GaussianMixture, MixtureBackbone, fit_tilt, ring

matplotlib.use("agg")
GRIDS = (4, 1, 2, 8)
BETAS = (0.0, 0.15, 0.3)
EVERY, MOST = 10, 600
FIT_STEPS, FIT_BATCH, FIT_RATE, FIT_PROJECTIONS = 2000, 1024, 1e-3, 64
SYSTEMS = ("rtdmd", "exact", "fitted", "real")


def measured(x: Tensor, target: GaussianMixture) -> dict[str, float]:
    real = real_sets(target)
    kl, share = masses_kl(x, target), target.share_within(x)
    return {"distance": distance(x, real), "floor": floor(real), "kl": kl, "share": share}


def student(runs: Path, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """By stated β, the student where it has reached it; an empty entry where it never did."""
    build = tilt(cold_start(runs, steps, seed), steps, seed)
    mixture, roles = mixture_of(build), build.stage.roles
    found = {"0.0": {"rollouts": 0.0, **measured(sample(roles.ema, steps), mixture)}}
    left = [beta for beta in BETAS if beta > 0]
    for done in range(1, MOST + 1):
        build.stage.iteration(done - 1)
        build.stage.guard.failures()
        if done % EVERY:
            continue
        x = sample(roles.ema, steps)
        reached, kl_of_fit = fit_tilt(x, mixture, DIRECTION)
        while left and reached >= left[0]:
            beta = left.pop(0)
            more = {"rollouts": float(done), "fitted_beta": reached, "kl_of_fit": kl_of_fit}
            at_fit = measured(x, mixture.tilted(DIRECTION, reached))["distance"]
            target = mixture.tilted(DIRECTION, beta)
            found[str(beta)] = {**more, "distance_at_fit": at_fit, **measured(x, target)}
        if not left:
            break
    return found | {str(beta): {} for beta in left}


def fitted(target: GaussianMixture, steps: int, seed: int) -> nn.Module:
    """The student's network as a K-step generator, fitted to exact samples of the target."""
    backbone = MixtureBackbone()
    network, generator = backbone.new_student(seed), torch.Generator().manual_seed(seed)
    sigmas, cond = backbone.few_step_sigmas(steps), backbone.encode([""] * FIT_BATCH)
    adam = torch.optim.Adam(network.parameters(), lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, FIT_STEPS)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for _ in range(FIT_STEPS):
        x = draw(FIT_BATCH, 2)
        for k in range(steps):
            mean, std = step(lambda x, s, c: network(x, s), x, sigmas, k, cond, ETA)
            x = mean + std * draw(FIT_BATCH, 2)
        directions = draw(2, FIT_PROJECTIONS)
        directions = directions / directions.norm(dim=0)
        real = target.sample(FIT_BATCH, generator)
        gap = (x @ directions).sort(0).values - (real @ directions).sort(0).values
        adam.zero_grad()
        gap.square().mean().backward()
        adam.step()
        schedule.step()
    return network.requires_grad_(False)


def exact(target: GaussianMixture, steps: int, seed: int) -> dict[str, float]:
    return measured(sample(lambda x, s, c: target.velocity(x, s), steps, seed=seed), target)


def fit(target: GaussianMixture, steps: int, seed: int) -> dict[str, float]:
    network = fitted(target, steps, seed)
    return measured(sample(lambda x, s, c: network(x, s), steps, seed=1 + seed), target)


def real(target: GaussianMixture, seed: int) -> dict[str, float]:
    return measured(target.sample(POINTS, torch.Generator().manual_seed(100 + seed)), target)


def fill(cells: Cells, runs: Path, seeds: int) -> None:
    """Every cell, the first seed of all before the second of any."""
    targets = {beta: ring().tilted(DIRECTION, beta) for beta in BETAS}
    for seed in range(seeds):
        for beta, target in targets.items():
            cells.cell(f"real, beta {beta}, seed {seed}", partial(real, target, seed))
        for steps in GRIDS:
            for beta, target in targets.items():
                name = f"exact, K {steps}, beta {beta}, seed {seed}"
                cells.cell(name, partial(exact, target, steps, 1 + seed))
            cells.cell(f"rtdmd, K {steps}, seed {seed}", partial(student, runs, steps, seed))
            for beta in BETAS[1:]:
                name = f"fitted, K {steps}, beta {beta}, seed {seed}"
                cells.cell(name, partial(fit, targets[beta], steps, seed))


def values(cells: Cells, system: str, steps: int, beta: float) -> Iterator[dict[str, Any]]:
    """What each seed gave, where it gave something."""
    for name, cell in cells.found.items():
        kind, *rest = name.split(", ")
        if kind != system or (kind != "real" and f"K {steps}" not in rest):
            continue
        if kind == "rtdmd":
            if cell.get(str(beta)):
                yield cell[str(beta)]
        elif f"beta {beta}" in rest:
            yield cell


def table(cells: Cells) -> None:
    """A row for each β and K; distances over those of real samples."""
    names = SYSTEMS[:-1]
    heads = [f"{n} distance" for n in names] + [f"{n} KL" for n in names] + ["rtdmd share"]
    print("| β | K | seeds | " + " | ".join(heads) + " |")
    print("|---|---|---|" + "---|" * len(heads))
    for beta, steps in itertools.product(BETAS, sorted(GRIDS)):
        found = {name: list(values(cells, name, steps, beta)) for name in SYSTEMS}
        if not found["exact"]:
            continue
        row = [shown([f["distance"] / f["floor"] for f in found[n]], 2) for n in names]
        row += [shown([f["kl"] for f in found[n]], 4) for n in names]
        row.append(shown([f["share"] for f in found["rtdmd"]], 3))
        seeds = len(found["rtdmd"]) or len(reached(cells, steps))
        print(f"| {beta} | {steps} | {seeds} | " + " | ".join(row) + " |")


def shown(found: list[float], digits: int) -> str:
    return spoken(found, digits) if found else "–"


def reached(cells: Cells, steps: int) -> list[str]:
    """The runs at K, whether they reached a β or not."""
    return [name for name in cells.found if name.startswith(f"rtdmd, K {steps},")]


COLOURS = {"rtdmd": "#1f5fa8", "exact": "#c0392b", "fitted": "#2e8b57", "real": "#777777"}
LABELS = {
    "rtdmd": "student (RTDMD)",
    "exact": "exact tilted velocity in K steps",
    "fitted": "the same network, fitted to exact samples",
    "real": "real samples",
}


def line(axis: Any, cells: Cells, system: str, beta: float, figure: str) -> None:
    """A figure of a system over K: the mean over seeds with its interval."""
    points = []
    for steps in sorted(GRIDS):
        found = list(values(cells, system, steps, beta))
        if found:
            points.append((steps, *interval([one[figure] for one in found])))
    if not points:
        return
    at, mean, low, high = zip(*points, strict=True)
    below = [m - max(lo, m / 3) for m, lo in zip(mean, low, strict=True)]
    above = [h - m for m, h in zip(mean, high, strict=True)]
    colour, label = COLOURS[system], LABELS[system]
    axis.errorbar(at, mean, yerr=[below, above], color=colour, marker="o", label=label)


def plot(cells: Cells, path: Path) -> None:
    """Distance and KL over K, a row of panels for each β."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey="col")
    titles = {"distance": "sliced Wasserstein distance", "kl": "KL of the mode masses"}
    for row, beta in zip(axes, BETAS[1:], strict=True):
        for axis, (name, title) in zip(row, titles.items(), strict=True):
            for system in SYSTEMS:
                line(axis, cells, system, beta, name)
            axis.set(xscale="log", yscale="log", title=f"{title}, β = {beta}")
            axis.set_xticks(sorted(GRIDS), [str(k) for k in sorted(GRIDS)])
            axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("steps K")
    axes[0, 1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = arguments("tilted_target", __doc__, 3)
    settings = {"betas": BETAS, "points": POINTS, "look_every": EVERY, "most_rollouts": MOST}
    settings |= {"fit_steps": FIT_STEPS, "fit_batch": FIT_BATCH, "fit_rate": FIT_RATE}
    cells = Cells(args.out, settings)
    fill(cells, args.runs, args.seeds)
    table(cells)
    plot(cells, args.figure)


if __name__ == "__main__":
    main()
