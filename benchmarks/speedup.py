"""Iterations of both stages against a straightforward version of them (support/plain.py).

The demo's recipes on the embedded model, all versions in one process and in turn, the median over
the rounds of the ratio to the straightforward version in fp32. bf16 is autocast; both versions run
in both precisions, so that what the precision alone brings can be told from the rest. Stage 1 also
with the published ratio of updates and form of the regulariser. Where there is a C++ compiler, also
the library's last version with `model.compile`, which takes a minute or two to build.

    python benchmarks/speedup.py [--rounds 3] [--batch 64] [--cases cold_start published tilt]
                                 [--no-compile]
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from support.plain import Plain
from support.stages import Model, model
from support.tables import interleaved, median, ratio, report

from tiltflow.setup.build import adapter_settings, attention_for, build_backbone
from tiltflow.training.cold_start import ColdStart, Cycle

PUBLISHED = ["cold_start.generator_every=10", "cold_start.consistency_form=two_sample"]
LAST_STEP = ["tilt.reward_steps=1", "tilt.reward_normalise=false"]  # as published


@dataclass(frozen=True)
class Case:
    """Settings of a stage, `window` iterations of which are a round, and the library's variants."""

    stage: str
    settings: str
    window: int
    more: Sequence[str] = ()
    variants: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})


CASES = {
    "cold_start": Case(
        "cold_start", "demo's", 8, (), {", step run again": ["cold_start.keep_graph=false"], "": ()}
    ),
    "published": Case(
        "cold_start", "published", 10, PUBLISHED, {"": (), ", reuse 4": ["cold_start.reuse=4"]}
    ),
    "tilt": Case("tilt", "demo's, last step", 1, LAST_STEP),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def of_library(made: Model, stage: str, window: int, *more: str) -> Callable[[], None]:
    build, step = made.build(stage, *more), 0
    cfg, cpu = made.config(stage, *more), torch.device("cpu")

    def run() -> None:
        nonlocal step
        with attention_for(cfg, cpu):
            for _ in range(window):
                build.stage.iteration(step)
                step += 1
            build.stage.guard.failures()

    return run


def of_plain(
    made: Model, stage: str, window: int, precision: torch.dtype | None, *more: str
) -> Callable[[], None]:
    build, cfg = made.build(stage, *more), made.config(stage, *more)
    backbone = build_backbone(cfg, "image")  # one of its own: that of `build` has adapters on it
    plain = Plain(cfg, backbone, adapter_settings(cfg, backbone), precision)
    size = cfg.tilt.group_size if stage == "tilt" else 1
    count, step = cfg.train.batch_size // size, 0

    def run() -> None:
        nonlocal step
        for _ in range(window):
            indices = build.stage.sampler.indices(step * count, count)
            cond, prompts = build.prompts.select(indices, build.backbone.device)
            if isinstance(build.stage, ColdStart):
                # the library's boundaries: by its own draw it could have shorter rollouts
                (stop,) = build.stage.stops(Cycle.of(step, 1, cfg.cold_start.generator_every))
                plain.cold_start(step, cond, stop)
            else:
                repeated = [p for p in prompts for _ in range(size)]
                plain.tilt(cond.repeat(size), repeated, build.stage.rewards)  # type: ignore[union-attr]
            step += 1

    return run


def systems(made: Model, case: Case, compiled: bool, *more: str) -> dict[str, Callable[[], None]]:
    """The versions of a stage by name, the one that all are compared with first."""
    found, common = {}, (*case.more, *more)
    for name, precision in PRECISIONS.items():
        found[f"straightforward, {name}"] = of_plain(
            made, case.stage, case.window, precision, *common
        )
    versions = {
        f"tiltflow, {name}{variant}": [
            f"model.autocast={'bf16' if precision else 'null'}", *common, *changes
        ]
        for name, precision in PRECISIONS.items()
        for variant, changes in case.variants.items()
    }  # fmt: skip
    if compiled:  # the last: in bf16 and with the last variant
        last = list(versions)[-1]
        versions[f"{last}, compiled"] = [*versions[last], "model.compile=true"]
    for name, options in versions.items():
        found[name] = of_library(made, case.stage, case.window, *options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None
    )
    args = parser.parse_args()
    rows = []
    with model() as made:
        for case in (CASES[name] for name in args.cases):
            runs = systems(made, case, args.compile, f"train.batch_size={args.batch}")
            seconds = interleaved(runs, args.rounds)
            first = next(iter(runs))
            for name, values in seconds.items():
                share = ratio(values, seconds[first])
                each = median(values) / case.window
                rows.append([case.stage, case.settings, name, each, share])
                print(rows[-1], flush=True)
    columns = ["stage", "settings", "version", "iteration, CPU s", "of straightforward fp32"]
    report("speedup", columns, rows, batch=args.batch, rounds=args.rounds)


if __name__ == "__main__":
    main()
