"""Kills runs at random moments and checks that each, resumed, ends as if nothing had happened.

Both stages on the mixture, a checkpoint after every step. Every other kill waits for a save to
begin and comes at a random moment of it; the others come at any moment of the run. A kill is
SIGKILL to the whole process. The resumed run must end with the weights, the optimizer states and
the metrics of the uninterrupted one, bit for bit.

    python benchmarks/kill_resume.py [--kills 50] [--json docs/data/kill_resume.json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no threads before that

import argparse
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tiltflow.backbones.mixture import MixtureBackbone
from tiltflow.checkpoint import latest_step, load_checkpoint
from tiltflow.commands.train import run_training
from tiltflow.config import load_config
from tiltflow.metrics import read_metrics

STEPS = 16
STAGES = ("cold_start", "tilt")
COMMON = (
    "train.batch_size=32",
    f"train.steps={STEPS}",
    "checkpoint.every=1",
    "log.every=1",
    "run.device=cpu",
    "run.resume=auto",
)
OF_STAGE = {
    "cold_start": ("cold_start.generator_every=2",),
    "tilt": ("tilt.group_size=8", "tilt.fake_score_updates=2"),
}


@dataclass(frozen=True)
class Kill:
    """One kill: when it came, what lay on disk then, and how the resumed run ended."""

    stage: str
    seconds: float
    during_save: bool
    latest: int | None
    leftovers: list[str]
    bit_equal: bool


def spawn(stage: str, out: Path, cold: Path) -> int:
    """Starts (or resumes) a run in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        more = () if stage == "cold_start" else (f"model.few_step={cold}",)
        overrides = [*COMMON, *OF_STAGE[stage], *more, f"run.out={out}"]
        run_training(load_config(f"mixture_{stage}", overrides), Console(quiet=True))
        status = 0
    finally:
        os._exit(status)


def complete(stage: str, out: Path, cold: Path) -> float:
    """Runs to the end; the seconds that it took."""
    began = time.monotonic()
    _, status = os.waitpid(spawn(stage, out, cold), 0)
    if status != 0:
        raise SystemExit(f"the run in {out} failed (status {status})")
    return time.monotonic() - began


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def writing(out: Path) -> list[str]:
    """What a save has put beside the checkpoints and not yet in its place."""
    try:
        return [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
    except FileNotFoundError:
        return []


def wait(pid: int, until: Callable[[], bool]) -> bool:
    """Whether `until` came true before the process ended."""
    while not until():
        if ended(pid):
            return False
        time.sleep(0.0003)
    return True


def state(out: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Every tensor of the last checkpoint, and the metrics."""
    found = load_checkpoint(out)
    tensors = {f"{g}/{k}": v for g, table in found.tensors.items() for k, v in table.items()}
    return tensors, read_metrics(out / "metrics.jsonl")


def equal(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits and the same metrics."""
    (x, rows), (y, others) = state(a), state(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) and rows == others


def strike(stage: str, out: Path, whole: Path, cold: Path, seconds: float, save: bool) -> Kill:
    """One kill and one resume; a run that was quicker than the kill, or a save that was, is tried
    again."""
    began = time.monotonic()
    pid = spawn(stage, out, cold)
    if save:
        target = random.randrange(1, STEPS - 1)
        alive = wait(pid, lambda: (latest_step(out) or 0) >= target and bool(writing(out)))
        pause = random.uniform(0, 0.004)
    else:
        pause = random.uniform(0, seconds)
        alive = wait(pid, lambda: time.monotonic() - began > pause)
        pause = 0.0
    if alive:
        time.sleep(pause)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    took, step, leftovers = time.monotonic() - began, latest_step(out), writing(out)
    if not alive or step == STEPS or (save and not leftovers):
        return strike(stage, out.with_name(f"{out.name}_again"), whole, cold, seconds, save)
    complete(stage, out, cold)
    return Kill(stage, took, bool(leftovers), step, leftovers, equal(out, whole))


def table(kills: list[Kill]) -> str:
    """The kills by stage, in Markdown."""
    lines = [
        "| stage | kills | during a save | before the first save | ended bit-equal |",
        "|---|---|---|---|---|",
    ]
    for stage in STAGES:
        mine = [kill for kill in kills if kill.stage == stage]
        counts = (
            len(mine),
            sum(kill.during_save for kill in mine),
            sum(kill.latest is None for kill in mine),
            sum(kill.bit_equal for kill in mine),
        )
        lines.append(f"| `{stage}` | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("docs/data/kill_resume.json"))
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    MixtureBackbone().new_student(0)  # fitted once, for all the forks
    kills = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        whole = {stage: home / stage for stage in STAGES}
        seconds = {s: complete(s, whole[s], whole["cold_start"]) for s in STAGES}
        for number in range(args.kills):
            stage = STAGES[number % 2]
            save = number % 4 < 2
            kill = strike(
                stage, home / f"{number}", whole[stage], whole["cold_start"], seconds[stage], save
            )
            kills.append(kill)
            print(
                f"{number + 1:3d} {stage:10s} at {kill.seconds:5.2f} s, last saved step "
                f"{kill.latest}, {'during a save, ' if kill.during_save else ''}"
                f"{'bit-equal' if kill.bit_equal else 'DIFFERENT'}",
                flush=True,
            )
    equals = sum(kill.bit_equal for kill in kills)
    result = {
        "kills": len(kills),
        "bit_equal": equals,
        "during_save": sum(kill.during_save for kill in kills),
        "steps": STEPS,
        "seconds_of_a_run": {stage: round(s, 2) for stage, s in seconds.items()},
        "runs": [vars(kill) | {"seconds": round(kill.seconds, 3)} for kill in kills],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(kills))
    if equals < len(kills):
        raise SystemExit(f"{len(kills) - equals} of {len(kills)} runs differ")


if __name__ == "__main__":
    main()
