"""`tiltflow doctor`: looking before training."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from tiltflow.config.load import load_config
from tiltflow.core.sentences import counted
from tiltflow.models.pipelines.files import unread_shards
from tiltflow.setup.build import device_of
from tiltflow.setup.checks import Finding, Subject, findings
from tiltflow.setup.planner import GIB, OVERHEAD, Plan
from tiltflow.setup.start_notices import start_notices
from tiltflow.tasks.planning import fastest, is_auto, sentence, sized, with_graphs
from tiltflow.tasks.plans import Plans

PACKAGES = ("tiltflow", "torch", "diffusers", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def examine(
    recipe: str | None, overrides: Sequence[str], console: Console, memory: float | None = None
) -> None:
    """Prints versions and device; with a recipe, what each check of it says, and a plan.

    `memory` is the device's in GiB; None takes that of this machine's, if it has one.

    Raises:
        ValueError: in one sentence, what is wrong with the recipe, after everything is printed.
    """
    if memory is not None and not math.isfinite(memory):
        raise ValueError(f"--memory is {memory}, but it should be a number of GiB")
    for name, value in versions().items():
        console.print(f"{name} {value}")
    console.print(f"device {device_of('auto')}, {counted(torch.get_num_threads(), 'thread')}")
    if recipe is not None:
        cfg = load_config(recipe, overrides)
        subject = Subject(cfg)
        found = list(findings(subject))
        for finding in found:
            console.print(f"{finding.name}: {_verdict(finding).removeprefix(f'{finding.name}: ')}")
        wrong = {one.name for one in found if one.error}
        sound = cfg.model.has_files and not {"model", "weights"} & wrong
        place = subject.pipelines.here("model") if sound else None
        lines = [] if place is None else unread_shards(place)
        if not {"model", "stage 1", "prompts"} & wrong:
            lines += start_notices(cfg, subject.prompts.train, subject.pipelines)
        for line in lines:
            console.print(f"warning: {line}")
        groups = "" if cfg.stage == "cold_start" else f" in groups of {cfg.tilt.group_size}"
        failed = {finding.name: finding for finding in found if finding.failed}
        order = ", in order" if not failed else ""
        console.print(
            f"{recipe}: {cfg.stage}, {counted(cfg.train.steps, 'step')} of "
            f"{counted(cfg.train.batch_size, 'sample')}{groups}{order}"
        )
        if cfg.model.has_files and not {"model", "weights", "adapters"} & set(failed):
            console.print("[dim]planning its memory, phase by phase …[/]")
            have = device_memory() if memory is None else memory
            planned = Plans(cfg)
            if is_auto(cfg):
                room = None if have is None else have * GIB
                opened, cfg = cfg, sized(cfg, room, cfg.train.batch_size, planned)
                parts, made = fastest(cfg, room, planned)
                cfg, made = with_graphs(cfg, parts, made, room, planned)
                console.print(sentence(opened, cfg, made, room))
            models, unknown = planned.models
            show_plan(planned(cfg), have, console)
            if models:
                console.print(
                    "of reward models the weights are counted, and for what they compute with as "
                    "much again as the largest has"
                )
            if unknown:
                console.print(f"not counted, for its size is not known: {', '.join(unknown)}")
        if len(failed) == 1:
            raise ValueError(next(str(finding.error) for finding in failed.values()))
        if failed:
            raise ValueError(f"{recipe}: {len(failed)} checks failed ({', '.join(failed)})")


def _verdict(finding: Finding) -> str:
    if not finding.seen:
        return "not looked at"
    if finding.error is None:
        return "ok"
    return f"not yet: {finding.error}" if finding.note else str(finding.error)


def device_memory() -> float | None:
    """The memory of this machine's GPU in GiB, if it has one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def show_plan(made: Plan, memory: float | None, console: Console) -> None:
    """The plan as a table in GiB, and whether it fits into `memory` GiB."""
    table = Table(title="memory on the device")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in made.held.items():
        table.add_row(name, f"{size / GIB:.2f}")
    for name, size in made.phases.items():
        table.add_row(f"while in: {name}", f"{size / GIB:.2f}", style="dim")
    table.add_row("peak of an iteration", f"{made.peak / GIB:.2f}", style="bold")
    table.add_row("while encoding prompts", f"{made.encoding / GIB:.2f}")
    table.add_row("allowed for CUDA and its allocator", f"{OVERHEAD / GIB:.2f}")
    console.print(table)
    if memory is not None:
        verdict = "fits" if made.fits(memory * GIB) else "does not fit"
        console.print(f"{verdict} into {memory:.1f} GiB")
