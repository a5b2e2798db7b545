"""Both stages beside the authors' own implementation, in one process and in turn.

Their repository is not ours to ship: give the folder of a checkout, and its trainer's own
`train_step` (stage 1) and epoch (stage 2) are driven with the same networks, prompts and rollout
lengths. What is replaced are their surroundings: the loading of weights, the wrapping for several
GPUs, the text encoders (embeddings are looked up), the draw of the rollout's length, and in stage 2
the loading of CLIP, which is the packaged one in both. Without the folder ours alone is measured.

On a CPU the figures are CPU seconds on small networks (4 blocks of width 256), on a GPU seconds by
the clock at the real geometry. An iteration is (9 of the fake score alone + 1 with the generator's
update) / 10; of stage 2 it is an epoch, in fp32. Ratios are medians over rounds.

    python benchmarks/reference.py [--reference DIR] [--stage cold_start] [--rounds 3]
                                   [--sides 64 128] [--device cpu] [--batch 4] [--plain] [--compile]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.utils import logging
from support.random_model import random_model
from support.reference_parts import (
    Bench,
    cold_start_of_theirs,
    find_theirs,
    on_device,
    prompts,
)
from support.reference_tilt import BATCH, tilt_of_ours, tilt_of_theirs
from support.tables import median, ratio, report

from tiltflow.setup.build import attention_for
from tiltflow.training.cold_start import ColdStart, Cycle

EVERY = 10
STOPS = (2, 3)
"""Rollout lengths, dealt out to all alike: of these the mean is that of 1 to 4."""
Run = Callable[[int, bool], None]
"""One iteration with a rollout of so many steps, with the generator's update or without."""


def of_ours(bench: Bench, *more: str) -> Run:
    """Iterations of the recipe, picked by the length of their rollout."""
    settings = bench.settings(*more)
    build, cfg = (
        bench.model.build("cold_start", *settings),
        bench.model.config("cold_start", *settings),
    )
    stage = build.stage
    assert isinstance(stage, ColdStart)
    places: dict[tuple[int, bool], int] = {}
    for step in range(400):
        key = (stage.stops(Cycle.of(step, 1, EVERY))[0], (step + 1) % EVERY == 0)
        places.setdefault(key, step)

    def run(stop: int, generator: bool) -> None:
        with attention_for(cfg, bench.model.device):
            stage.iteration(places[stop, generator])

    return run


def of_theirs(bench: Bench, folder: Path, checkpointing: bool) -> Run:
    """Iterations of the authors' trainer at `folder`, with their published settings."""
    cfg = bench.model.config("cold_start", *bench.settings())
    trainer = cold_start_of_theirs(bench, folder, cfg, model__gradient_checkpointing=checkpointing)
    known = prompts(bench, cfg)
    trainer._encode_prompts = lambda batch: (known[0][: len(batch)], known[1][: len(batch)])
    trainer._uncond_embeds = (known[0][-1:], known[1][-1:])

    def run(stop: int, generator: bool) -> None:
        trainer.global_step = EVERY - 1 if generator else 0
        with on_device(bench.model.device), rollout_length(stop):
            trainer.train_step(["a prompt"] * bench.batch)

    return run


@contextmanager
def rollout_length(stop: int) -> Iterator[None]:
    """Their draw of the rollout's length gives `stop`; other draws are as they were."""
    plain = torch.randint

    def drawn(*args: Any, **kwargs: Any) -> torch.Tensor:
        one = kwargs.get("size") == (1,) and kwargs.get("low") == 1
        found = plain(*args, **kwargs)
        return found.fill_(stop) if one else found

    with patch.object(torch, "randint", drawn):
        yield


def measured(bench: Bench, runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds an iteration, all versions in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            kinds = []
            for generator in (False, True):
                began = bench.clock()
                for stop in STOPS:
                    run(stop, generator)
                kinds.append((bench.clock() - began) / len(STOPS))
            if number:
                seconds[name].append(((EVERY - 1) * kinds[0] + kinds[1]) / EVERY)
    return seconds


def measured_tilt(bench: Bench, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds an epoch of stage 2, all versions in turn, after one round that does not count."""
    runs = {}
    if args.reference:
        runs["reference, checkpointing"] = tilt_of_theirs(bench, args.reference)
    every = "model.gradient_checkpointing=true"
    runs["tiltflow, checkpointing"] = tilt_of_ours(bench, every, "tilt.keep_graph=false")
    by_hand = ("model.gradient_checkpointing=false", "tilt.keep_graph=false")
    runs["tiltflow, recomputing nothing"] = tilt_of_ours(bench, *by_hand)
    runs["tiltflow, as the recipe: auto"] = tilt_of_ours(bench)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + args.rounds):
        for name, run in runs.items():
            began = bench.clock()
            run(number)
            if number:
                seconds[name].append(bench.clock() - began)
    return seconds


def versions(bench: Bench, args: argparse.Namespace) -> dict[str, Run]:
    """The authors' first, if there are any, then ours."""
    runs: dict[str, Run] = {}
    if args.reference:
        runs["reference, checkpointing"] = of_theirs(bench, args.reference, checkpointing=True)
        if args.plain:
            runs["reference, no checkpointing"] = of_theirs(bench, args.reference, False)
    runs["tiltflow, checkpointing"] = of_ours(bench, "model.gradient_checkpointing=true")
    runs["tiltflow, as the recipe: auto"] = of_ours(bench)
    if args.compile:
        runs["tiltflow, auto, compiled"] = of_ours(bench, "model.compile=true")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' repository")
    stages = ("cold_start", "tilt")
    parser.add_argument("--stage", choices=stages, nargs="+", default=list(stages))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain", action="store_true", help="theirs without checkpointing too")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    small = args.device == "cpu"
    if args.reference:
        find_theirs(args.reference)
    else:
        print("no --reference: ours alone is measured, and the ratios are to our own recipe")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(args.device)
        for stage in args.stage:
            usual = [64] if stage == "tilt" else [64, 128]
            for side in args.sides or (usual if small else [512]):
                with random_model("sd35m", device, small, Path(folder)) as model:
                    if stage == "tilt":
                        seconds = measured_tilt(Bench(model, args.batch or BATCH, side), args)
                    else:
                        bench = Bench(model, args.batch or (4 if small else 9), side)
                        seconds = measured(bench, versions(bench, args), args.rounds)
                first = next(iter(seconds))
                for name, values in seconds.items():
                    ratios = ratio(values, seconds[first])
                    rows.append([stage, side, name, median(values), ratios])
                    print(rows[-1], flush=True)
    if not args.reference:
        return
    columns = ["stage", "pixels", "version", "an iteration, s", f"of {first}"]
    more = {"device": "CPU" if small else torch.cuda.get_device_name()}
    report("reference", columns, rows, rounds=args.rounds, **more)


if __name__ == "__main__":
    main()
