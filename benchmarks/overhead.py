"""What an iteration takes beyond the forward and backward passes that the algorithm needs.

An iteration of each stage runs once while every pass of the transformer, the autoencoder and the
reward is written down: which adapters, how many rows, with or without gradient. Then the iteration
and the bare list of these passes are timed in turn, in this process: `network(...)` on inputs made
beforehand, and `.backward(...)` where there was a gradient. The rest is the overhead: draws, flow
maths, losses, switching adapters, optimizer, EMA, metrics.

    python benchmarks/overhead.py [--rounds 3] [--widths 1 4] [--batch 32 8]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from support.stages import STAGES, model
from support.tables import interleaved, median, ratio, report
from torch import Tensor, nn

from tiltflow.setup.build import Build


@dataclass(frozen=True)
class Pass:
    """One call of a network: `call(*inputs)`, and `backward` where its result had a gradient."""

    what: str
    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    backward: bool

    def run(self) -> None:
        inputs = self.inputs
        with torch.enable_grad() if self.backward else torch.no_grad():
            out = self.call(*inputs)
        if self.backward:
            out.backward(torch.ones_like(out))


@contextmanager
def recorded(build: Build) -> Iterator[list[Pass]]:
    """The passes made while the context is open."""
    passes: list[Pass] = []
    backbone: Any = build.backbone
    stage: Any = build.stage
    rewards = getattr(stage, "rewards", None)
    scorers = [] if rewards is None else [item.reward for item in rewards.rewards]
    before = [scorer.image_features for scorer in scorers]
    forward, decode = backbone._forward, backbone.decode

    def seen_forward(network: nn.Module, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        out = forward(network, x, sigma, cond)
        role = next(r for r in _roles(stage) if r.switch and r.adapters == r.switch.active)
        kept = {key: value.detach().clone() for key, value in cond.items()}

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            mixed = torch.autocast("cpu", role.autocast) if role.autocast else nullcontext()
            with mixed, role.switch.use(role.adapters):
                return forward(network, x, sigma, kept)

        inputs = (x.detach().clone(), sigma.clone())
        passes.append(Pass(f"{role.name} × {len(x)}", call, inputs, out.requires_grad))
        return out

    def seen(what: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            out = function(x)
            leaf = x.detach().clone().requires_grad_(out.requires_grad)
            passes.append(Pass(f"{what} × {len(x)}", function, (leaf,), out.requires_grad))
            return out

        return call

    backbone._forward, backbone.decode = seen_forward, seen("decode", decode)
    for scorer, features in zip(scorers, before, strict=True):
        scorer.image_features = seen(scorer.name, features)
    try:
        yield passes
    finally:
        backbone._forward, backbone.decode = forward, decode
        for scorer, features in zip(scorers, before, strict=True):
            scorer.image_features = features


def _roles(stage: Any) -> list[Any]:
    named = stage.roles
    return [named.teacher, named.generator, *named.fake_score.singles, named.ema]


def measure(build: Build, window: int, rounds: int) -> tuple[dict[str, list[float]], Counter]:
    """Seconds of `window` iterations and of their bare passes, and the passes by kind.

    The same iterations each time, so that they draw the same numbers of sampler steps.
    """

    def iterations() -> None:
        for step in range(window):
            build.stage.iteration(step)
        build.stage.guard.failures()

    with recorded(build) as passes:
        iterations()

    def bare() -> None:
        for made in passes:
            made.run()
        for updater in build.stage.updaters.values():
            updater.optimizer.zero_grad(set_to_none=True)

    seconds = interleaved({"iteration": iterations, "bare": bare}, rounds)
    return seconds, Counter(
        (p.what, "forward, backward" if p.backward else "forward") for p in passes
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 8], help="one a width")
    args = parser.parse_args()
    rows, passes = [], {}
    for width, batch in zip(args.widths, args.batch, strict=True):
        with model(width) as made:
            for stage in STAGES:
                build = made.build(stage, f"train.batch_size={batch}")
                window = build.stage.generator_every if stage == "cold_start" else 1  # type: ignore[union-attr]
                seconds, kinds = measure(build, window, args.rounds)
                over = ratio(seconds["iteration"], seconds["bare"]) - 1
                each = [median(seconds[name]) / window for name in ("iteration", "bare")]
                rows.append([stage, f"{width}×", batch, *each, f"{100 * over:.1f}%"])
                passes[f"{stage} {width}×"] = {f"{w}, {how}": n for (w, how), n in kinds.items()}
                print(rows[-1], flush=True)
    columns = ["stage", "width", "batch", "iteration, CPU s", "bare passes, CPU s", "overhead"]
    report("overhead", columns, rows, passes=passes, rounds=args.rounds)


if __name__ == "__main__":
    main()
