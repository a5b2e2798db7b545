"""Parallel efficiency of gloo ranks against as many processes that know nothing of each other.

Each process has both: its rank's part of a global batch, and a run of its own on a batch as large
as that part. They are timed in turn, all processes at once, by the wall clock: so both meet the
same contention for cores and memory, and what is left is communication and waiting for each other.

    python benchmarks/ranks.py [--sizes 1 2 4] [--rounds 3] [--rows 8]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no threads before that

import argparse
import json
import socket
import tempfile
import time
from pathlib import Path

import torch
from support.stages import STAGES, Model, model
from support.tables import median, ratio, report

from tiltflow.core.distributed import Ranks, ranks_of_job


def work(made: Model, stage: str, ranks: Ranks, rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest process, together and independent."""
    window = 2 if stage == "cold_start" else 1
    builds = {
        "together": made.build(stage, f"train.batch_size={rows * ranks.size}", ranks=ranks),
        "independent": made.build(stage, f"train.batch_size={rows}"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    for number in range(rounds + 1):
        for name, build in builds.items():
            ranks.total([0.0])  # all begin at once
            began = time.perf_counter()
            for step in range(number * window, (number + 1) * window):
                build.stage.iteration(step)
            build.stage.guard.failures()
            took = (time.perf_counter() - began) / window
            slowest = [0.0] * ranks.size
            slowest[ranks.rank] = took
            if number:
                seconds[name].append(max(ranks.total(slowest)))
    return seconds


def job(made: Model, size: int, rows: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Both stages on `size` forked ranks; what rank 0 measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(made, rank, size, port, rows, rounds, Path(folder)) for rank in range(size)]
        if any(os.waitpid(pid, 0)[1] for pid in pids):
            raise SystemExit("a rank failed")
        return dict(json.loads((Path(folder) / "seconds.json").read_text()))


def _fork(made: Model, rank: int, size: int, port: int, rows: int, rounds: int, out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        with ranks_of_job(torch.device("cpu")) as ranks:
            found = {stage: work(made, stage, ranks, rows, rounds) for stage in STAGES}
        if rank == 0:
            (out / "seconds.json").write_text(json.dumps(found))
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="of the batch, a rank")
    args = parser.parse_args()
    rows = []
    with model() as made:
        for size in args.sizes:
            for stage, seconds in job(made, size, args.rows, args.rounds).items():
                efficiency = ratio(seconds["independent"], seconds["together"])
                each = [median(seconds[name]) for name in ("independent", "together")]
                rows.append([stage, size, size * args.rows, *each, efficiency])
                print(rows[-1], flush=True)
    columns = ["stage", "ranks", "batch", "independent, s", "together, s", "efficiency"]
    report("ranks", columns, rows, rounds=args.rounds, cores=os.cpu_count())


if __name__ == "__main__":
    main()
