"""Time and memory of an iteration of both stages over batch, resolution and group size.

The demo's recipes on the embedded model; each case in a forked process of its own, because a
process keeps what it once had. Memory is the resident set (Linux): after the build, and its highest
during the iterations.

    python benchmarks/growth.py [--rounds 1]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no threads before that

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from support.stages import STAGES, Model, model
from support.tables import median, report

BASE = {"batch": 32, "resolution": 64, "group": 4}
CASES = [
    *({"stage": s, "batch": b} for s in STAGES for b in (8, 16, 32, 64)),
    *({"stage": s, "batch": 8, "resolution": r} for s in STAGES for r in (32, 128)),
    *({"stage": "tilt", "group": g} for g in (2, 8, 16)),
]


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {what}")


def measure(made: Model, case: dict[str, int | str], rounds: int) -> list[float]:
    """CPU seconds of an iteration, memory after the build and at its highest during iterations.

    Iterations are taken by windows that hold a generator update, whatever the stage.
    """
    torch.set_num_threads(1)
    stage = str(case["stage"])
    more = [f"train.batch_size={case['batch']}", f"model.resolution={case['resolution']}"]
    more += [f"tilt.group_size={case['group']}"] if stage == "tilt" else []
    build = made.build(stage, *more)
    window = 2 if stage == "cold_start" else 1
    standing = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is counted from here on
    seconds = []
    for number in range(rounds + 1):
        began = time.process_time()
        for step in range(number * window, (number + 1) * window):
            build.stage.iteration(step)
        build.stage.guard.failures()
        seconds.append((time.process_time() - began) / window)
    return [median(seconds[1:]), standing, resident("VmHWM")]


def apart(work: Callable[[], Sequence[float]]) -> list[float]:
    """What `work` gives in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(write, json.dumps(list(work())).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise SystemExit("a case failed")
    return list(json.loads(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rows = []
    with model() as made:
        for given in CASES:
            case = {**BASE, **given}
            found = apart(lambda case=case: measure(made, case, args.rounds))  # type: ignore[misc]
            group = case["group"] if case["stage"] == "tilt" else ""
            samples = 1000 * found[0] / int(case["batch"])
            row = [case["stage"], case["batch"], case["resolution"], group, found[0], samples]
            rows.append([*row, round(found[1]), round(found[2])])
            print(rows[-1], flush=True)
    columns = ["stage", "batch", "pixels", "group", "iteration, CPU s", "a sample, ms"]
    columns += ["memory after the build, MB", "highest, MB"]
    report("growth", columns, rows, rounds=args.rounds)


if __name__ == "__main__":
    main()
