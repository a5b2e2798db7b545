"""Runs of one or several gloo ranks in forked processes, and what they train on.

The fork server imports the libraries once, with one thread, and has fitted the mixture's student:
a rank then starts in milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import diffusers.pipelines.pipeline_utils
import numpy as np
import peft
import torch
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.core import distributed
from tiltflow.core.distributed import ranks_of_job
from tiltflow.core.randomness import Randomness
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.scores import AtSize, Diversity, System, evaluate_systems
from tiltflow.models.families.mixture import MixtureBackbone
from tiltflow.rewards.base import FunctionReward
from tiltflow.tasks.train import run_training

PREFIT = "TILTFLOW_TEST_PREFIT"
LIBRARIES = (diffusers.pipelines.pipeline_utils, peft)
"""What tiltflow imports where a pipeline is read, which would be in each rank."""


def fork_server() -> ForkServerContext:
    """The context whose server has this module imported and the mixture's student fitted."""
    context = multiprocessing.get_context("forkserver")
    here = Path(__file__).parent
    changes = {
        "PYTHONPATH": os.pathsep.join([str(here.parent / "src"), str(here)]),
        "OMP_NUM_THREADS": "1",
        PREFIT: "1",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    context.set_forkserver_preload([__name__])
    process = context.Process(target=int)  # starts the server, in this environment
    process.start()
    process.join()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def start(
    context: ForkServerContext, size: int, body: Callable, *args: object, log: Path
) -> list[ForkServerProcess]:
    """`size` ranks that run body(*args); each writes what it says into `log`/RANK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(parents=True, exist_ok=True)
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, log, body, args))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def finish(processes: Sequence[ForkServerProcess], timeout: float = 300) -> list[int | None]:
    """The exit statuses; a rank that does not end in time is killed."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _rank(rank: int, size: int, port: int, log: Path, body: Callable, args: Sequence) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    distributed.LINGER = 0.1
    with (log / f"{rank}.txt").open("w") as file, redirect_stderr(file):
        try:
            body(*args, console=Console(file=file, width=400))
        except Exception:
            traceback.print_exc(file=file)
            file.flush()
            raise


def train(recipe: str, overrides: Sequence[str], console: Console) -> None:
    run_training(load_config(recipe, overrides), console)


def evaluate(out: Path, console: Console) -> None:
    """Scores of a system that is a function of the prompt's number; rank 0 writes them."""
    random = Randomness(0)

    def sample(rows: Sequence[int]) -> torch.Tensor:
        return torch.stack([random.uniform("image", row, (3, 4, 4)) for row in rows])

    def redraw(rows: Sequence[int], draw: int) -> torch.Tensor:
        return torch.stack([random.uniform(f"image{draw}", row, (3, 4, 4)) for row in rows])

    reward = FunctionReward(lambda images, prompts, metadata: images.mean((1, 2, 3)), "mean")
    prompts = [Prompt(f"prompt {i}") for i in range(7)]
    extra = Diversity(lambda images: images.flatten(1), prompts=5, images=2)
    with ranks_of_job(torch.device("cpu")) as ranks:
        found = evaluate_systems(
            [System("a", 4, sample, redraw)], prompts, [reward], 2, diversity=extra, ranks=ranks
        )
        sizes = [  # fewer prompts than ranks at one of them, and one prompt at both
            AtSize("4", [0, 1, 2, 4, 5, 6], [System("a", 4, sample, redraw)]),
            AtSize("8", [3, 5], [System("a", 4, lambda rows: sample(rows) / 2, redraw)]),
        ]
        sized = evaluate_systems(
            sizes[0].systems, prompts, [reward], 2, diversity=extra, ranks=ranks, sizes=sizes
        )
        if ranks.main:
            arrays = {f"{s}/{r}": v for s, t in found.scores.items() for r, v in t.items()}
            arrays |= {f"sized {r}": v for r, v in sized.scores["a"].items()}
            arrays |= {f"at {n}": at.scores["a"]["mean"] for n, at in sized.sizes.items()}
            np.savez(out, **arrays)
            out.with_suffix(".json").write_text(json.dumps(found.summary))


def broken_now_and_then(points, prompts, metadata):
    """The first coordinate, but not a number for one point in a hundred, whoever has it."""
    rare = torch.remainder(64 * points[:, 1], 1) > 0.99
    return torch.where(rare, torch.nan, points[:, 0])


if os.environ.get(PREFIT):
    torch.set_num_threads(1)
    MixtureBackbone().new_student(0)
