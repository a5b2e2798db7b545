"""`tiltflow doctor`: looking before training."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from tiltflow.backbones.meta import text_encoders
from tiltflow.build import DTYPES, adapter_settings, device_of, fake_scores
from tiltflow.checks import Finding, Subject, findings
from tiltflow.config import RunConfig, load_config
from tiltflow.model_checks import meta_of
from tiltflow.paths import resolve_path
from tiltflow.planner import GIB, OVERHEAD, Job, Plan, TiltJob, plan

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
    for name, value in versions().items():
        console.print(f"{name} {value}")
    console.print(f"device {device_of('auto')}, {torch.get_num_threads()} threads")
    if recipe is not None:
        cfg = load_config(recipe, overrides)
        found = list(findings(Subject(cfg)))
        for finding in found:
            console.print(f"{finding.name}: {_verdict(finding).removeprefix(f'{finding.name}: ')}")
        groups = "" if cfg.stage == "cold_start" else f" in groups of {cfg.tilt.group_size}"
        failed = {finding.name: finding for finding in found if finding.failed}
        order = ", in order" if not failed else ""
        console.print(
            f"{recipe}: {cfg.stage}, {cfg.train.steps} steps of {cfg.train.batch_size} samples"
            f"{groups}{order}"
        )
        if cfg.model.path != "mixture" and not {"model", "weights", "adapters"} & set(failed):
            show_plan(plan_recipe(cfg), memory or device_memory(), console)
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


def plan_recipe(cfg: RunConfig) -> Plan:
    """What a recipe will hold in memory, from configurations alone.

    Raises:
        ValueError: if there is no directory of the pipeline and it is no published one.
    """
    model = cfg.model
    make = partial(meta_of, cfg)
    backbone = make()
    lora = cfg.adapters.kind == "lora"
    settings = adapter_settings(cfg, backbone) if lora else None
    tilt = None
    if cfg.stage == "tilt":
        backprop = cfg.tilt.reward_weight > 0 and any(r.backprop for r in cfg.rewards.values())
        chunk = cfg.tilt.decode_chunk or cfg.train.micro
        steps = cfg.tilt.reward_steps if backprop else 0
        tilt = TiltJob(cfg.tilt.group_size, chunk, steps, settings)
    chosen = cfg.tilt if cfg.stage == "tilt" else cfg.cold_start
    job = Job(
        batch=cfg.train.batch_size,
        micro=cfg.train.micro,
        steps=cfg.sampler.steps,
        guidance=backbone.guidance if model.guidance is None else model.guidance,
        consistency=chosen.consistency > 0,
        adapters=settings,
        checkpointing=model.checkpointed,
        tilt=tilt,
        fused=cfg.run.device != "cpu",
        boundaries=fake_scores(cfg),
        keep_graph=cfg.stage == "cold_start" and cfg.cold_start.keep_graph,
    )
    encoders = sum(
        p.numel() for e in text_encoders(resolve_path(model.path)).values() for p in e.parameters()
    )
    return plan(make, job, encoders * DTYPES[model.dtype].itemsize)


def device_memory() -> float | None:
    """The memory of this machine's GPU in GiB, if it has one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def show_plan(made: Plan, memory: float | None, console: Console) -> None:
    """The plan as a table in GiB, and whether it fits into `memory` GiB."""
    table = Table(title="memory on the device, without reward models")
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
