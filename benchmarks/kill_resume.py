"""Kills runs at random moments and checks that each, resumed, ends as if nothing had happened.

Both stages on the mixture, or on the embedded pipeline with its CLIP as the reward; a checkpoint
after every step. Every other kill waits for a save to begin and comes at a random moment of it;
the others come at any moment of the run. A kill is SIGKILL to the whole process. The resumed run
must end with the weights, the optimizer states and the metrics of the uninterrupted one, bit for
bit.

    python benchmarks/kill_resume.py [--model mixture] [--kills 50] [--stage tilt] [--json FILE]
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
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.models.families.mixture import MixtureBackbone
from tiltflow.tasks.train import run_training

STAGES = ("cold_start", "tilt")
COMMON = ("checkpoint.every=1", "log.every=1", "run.device=cpu", "run.resume=auto")
TEXTS = (
    "a red circle", "two blue squares", "a green triangle above a red square", "a blue circle",
    "three yellow circles", "a red square left of a blue triangle", "a green square",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is run: the recipes' prefix, how many steps, and what both stages and each are given."""

    recipes: str
    steps: int
    common: tuple[str, ...]
    of_stage: dict[str, tuple[str, ...]]


SETTINGS = {
    "mixture": Setting(
        "mixture",
        16,
        ("train.batch_size=32",),
        {
            "cold_start": ("cold_start.generator_every=2",),
            "tilt": ("tilt.group_size=8", "tilt.fake_score_updates=2"),
        },
    ),
    "embedded": Setting(
        "demo",
        8,
        (
            "train.batch_size=8",
            "train.micro_batch_size=4",  # of two prompts: scored together
            "model.autocast=null",
            "adapters.rank=2",
            "adapters.alpha=4.0",
            "data.prompts=prompts.txt",
            "data.eval_prompts=null",
            "watch.rewards={}",
            "log.samples_every=0",
        ),
        {
            "cold_start": ("cold_start.generator_every=2",),
            "tilt": ("tilt.group_size=2", "rewards={clipscore: 1.0}"),
        },
    ),
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


@dataclass(frozen=True)
class Job:
    """One stage of a setting, in a directory; stage 2 starts from the run `cold`."""

    setting: Setting
    stage: str
    out: Path
    cold: Path


def spawn(job: Job) -> int:
    """Starts (or resumes) a run in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        chosen = job.setting
        more = () if job.stage == "cold_start" else (f"model.few_step={job.cold}",)
        given = [
            *COMMON,
            *chosen.common,
            *chosen.of_stage[job.stage],
            f"train.steps={chosen.steps}",
        ]
        config = load_config(f"{chosen.recipes}_{job.stage}", [*given, *more, f"run.out={job.out}"])
        run_training(config, Console(quiet=True))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def complete(job: Job) -> float:
    """Runs to the end; the seconds that it took."""
    began = time.monotonic()
    _, status = os.waitpid(spawn(job), 0)
    if status != 0:
        raise SystemExit(f"the run in {job.out} failed (status {status})")
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


def strike(job: Job, whole: Path, seconds: float, save: bool) -> Kill:
    """One kill and one resume; a run that was quicker than the kill, or a save that was, is tried
    again."""
    began = time.monotonic()
    out, steps = job.out, job.setting.steps
    pid = spawn(job)
    if save:
        target = random.randrange(1, steps - 1)
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
    if not alive or step == steps or (save and not leftovers):
        return strike(replace(job, out=out.with_name(f"{out.name}_again")), whole, seconds, save)
    complete(job)
    return Kill(job.stage, took, bool(leftovers), step, leftovers, equal(out, whole))


def table(kills: list[Kill]) -> str:
    """The kills by stage, in Markdown."""
    lines = [
        "| stage | kills | during a save | before the first save | ended bit-equal |",
        "|---|---|---|---|---|",
    ]
    for stage in dict.fromkeys(kill.stage for kill in kills):
        mine = [kill for kill in kills if kill.stage == stage]
        counts = (
            len(mine),
            sum(kill.during_save for kill in mine),
            sum(kill.latest is None for kill in mine),
            sum(kill.bit_equal for kill in mine),
        )
        lines.append(f"| `{stage}` | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def prepare(model: str, home: Path) -> None:
    """What the forks share: the mixture's fitted student, or prompts and a cache of embeddings."""
    if model == "mixture":
        MixtureBackbone().new_student(0)
        return
    os.chdir(home)
    (home / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    os.environ["TILTFLOW_CACHE"] = str(home / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=SETTINGS, default="mixture")
    parser.add_argument("--stage", choices=STAGES, help="this one alone is killed")
    parser.add_argument("--json", type=Path, help="docs/data/kill_resume[_embedded].json")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    setting = SETTINGS[args.model]
    stages = (args.stage,) if args.stage else STAGES
    suffix = "" if args.model == "mixture" else f"_{args.model}"
    result_file = (args.json or Path(f"docs/data/kill_resume{suffix}.json")).absolute()
    kills = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare(args.model, home)
        whole = {stage: home / stage for stage in STAGES}
        jobs = {s: Job(setting, s, whole[s], whole["cold_start"]) for s in STAGES}
        seconds = {stage: complete(job) for stage, job in jobs.items()}
        for number in range(args.kills):
            stage = stages[number % len(stages)]
            save = number // len(stages) % 2 == 0
            job = replace(jobs[stage], out=home / f"{number}")
            kill = strike(job, whole[stage], seconds[stage], save)
            kills.append(kill)
            print(
                f"{number + 1:3d} {stage:10s} at {kill.seconds:5.2f} s, last saved step "
                f"{kill.latest}, {'during a save, ' if kill.during_save else ''}"
                f"{'bit-equal' if kill.bit_equal else 'DIFFERENT'}",
                flush=True,
            )
    equals = sum(kill.bit_equal for kill in kills)
    result = {
        "model": args.model,
        "kills": len(kills),
        "bit_equal": equals,
        "during_save": sum(kill.during_save for kill in kills),
        "steps": setting.steps,
        "seconds_of_a_run": {stage: round(s, 2) for stage, s in seconds.items()},
        "runs": [vars(kill) | {"seconds": round(kill.seconds, 3)} for kill in kills],
    }
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    print(table(kills))
    if equals < len(kills):
        raise SystemExit(f"{len(kills) - equals} of {len(kills)} runs differ")


if __name__ == "__main__":
    main()
