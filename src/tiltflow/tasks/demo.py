"""`tiltflow demo`: the ordinary commands on the embedded model, one after the other."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.text import Text

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step
from tiltflow.core.disk import write_whole
from tiltflow.data.prompts import load_prompts
from tiltflow.evaluation.suites import suite_of
from tiltflow.formats.folder import replacing
from tiltflow.tasks.evaluate import Request, evaluate_to
from tiltflow.tasks.report import NOTICE, write_run_report
from tiltflow.tasks.tables import show
from tiltflow.tasks.train import run_training

MODEL = "packaged:pipeline"
PROMPTS, FAST_PROMPTS = 1024, 24
FAST = {
    "cold_start": ("train.steps=10", "log.samples_every=10", "watch.every=10", "watch.prompts=12"),
    "tilt": ("train.steps=4", "log.samples_every=4", "watch.every=4", "watch.prompts=12"),
}

MADE = re.compile(
    r"cold_start|tilt|loop|export|notice\.txt|report\.html|evaluation\..*|\.export\..*"
)
"""What a demo leaves in its folder."""

SMOKE = (
    "This was a smoke run of a few iterations: it shows that everything works, and its figures "
    "mean nothing. The demo itself is the same command without --fast (make demo)."
)


def run_demo(out: Path, fast: bool, fresh: bool, console: Console) -> None:
    """Stage 1, stage 2, evaluation on held-out prompts, report; goes on where it was stopped."""
    began = time.time()
    if fresh and out.exists():
        _delete(out)
    if fast:  # `tiltflow report` is to say it too, whatever was stopped
        write_whole(out / NOTICE, SMOKE + "\n")
    else:
        (out / NOTICE).unlink(missing_ok=True)
    for stage in ("cold_start", "tilt"):
        console.rule(Text(stage, "bold"))
        train_stage(stage, out, FAST[stage] if fast else (), console)
    console.rule(Text("evaluation on held-out prompts", "bold"))
    suite = suite_of("shapes")
    request = Request(
        model=MODEL,
        prompts=load_prompts(str(suite.prompts))[: FAST_PROMPTS if fast else PROMPTS],
        few_step=out / "tilt" / "export" / "few_step",
        tilt_lora=out / "tilt" / "export" / "tilt",
        rewards=suite.rewards,
        diversity=True,
        autocast="auto",  # as in training
        batch=128,
    )
    result = evaluate_to(out / "evaluation.json", request, console)
    with replacing(out / "export") as part:
        shutil.copytree(out / "tilt" / "export", part, dirs_exist_ok=True)
    page = write_run_report([out], None)
    if not fast:
        show(result.summary, console)
    console.print(f"report: {page}")
    console.print(f"{(time.time() - began) / 60:.1f} minutes")
    if fast:
        console.print(SMOKE)


def _delete(out: Path) -> None:
    """An earlier demo.

    Raises:
        ValueError: if there is anything else in the folder.
    """
    others = sorted(path.name for path in out.iterdir() if not MADE.fullmatch(path.name))
    if others:
        raise ValueError(
            f"--fresh deletes {out}, but it holds {others[0]!r}, which is none of a demo's: "
            "give another --out"
        )
    shutil.rmtree(out)


def train_stage(
    stage: str, out: Path, changes: Sequence[str], console: Console, folder: str | None = None
) -> None:
    """One stage in `out`/`folder`, resumed if it was begun and passed over if it is done."""
    run = out / (folder or stage)
    overrides = [f"run.out={run}", "run.resume=auto", *changes]
    if stage == "tilt":
        overrides.append(f"model.few_step={out / 'cold_start'}")
    cfg = load_config(f"demo_{stage}", overrides)
    if latest_step(run) == cfg.train.steps and (run / "export").is_dir():
        console.print(f"{run} is done")
        return
    run_training(cfg, console)
    if latest_step(run) != cfg.train.steps:
        command = f"tiltflow demo --out {quote(str(out))}"
        command += " --loop" if folder else " --fast" if changes else ""
        console.print(f"the demo goes on where it stopped: {command}", soft_wrap=True)
        raise SystemExit(0)
