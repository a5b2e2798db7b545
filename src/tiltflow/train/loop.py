"""The page around a stage: resume, iterate, log, sample, save."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tiltflow.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tiltflow.interruption import Stopped, interruptible
from tiltflow.metrics import Accumulator, MetricsLog
from tiltflow.roles import Roles
from tiltflow.train.optim import Updater


class Stage(Protocol):
    """A stage of training; both of them are one `iteration` and the state behind it."""

    @property
    def roles(self) -> Roles: ...

    @property
    def updaters(self) -> dict[str, Updater]: ...

    def iteration(self, step: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Hooks:
    """What happens around the iterations. `sample` and `watch` get the number of done steps."""

    progress: Callable[[int, dict[str, float]], None] = lambda done, metrics: None
    sample: Callable[[int], None] = lambda done: None
    watch: Callable[[int], dict[str, float]] = lambda done: {}
    sample_every: int = 0
    watch_every: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """Iterations in all, and how often (in iterations) to log and to save; `keep` checkpoints."""

    steps: int
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    tensorboard: bool = False
    wandb: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts that go into each checkpoint's state (stage, adapters)."""


def train(stage: Stage, run: Path, settings: LoopSettings, hooks: Hooks, resume: bool) -> int:
    """Runs (or goes on with) a stage in the directory `run`; returns the number of done steps.

    Stopped by SIGINT or SIGTERM, it saves and returns early, from a wait for a reward server too:
    an iteration scores before it changes anything, so one that waited is begun anew. Counted
    randomness makes a resumed run equal to an uninterrupted one.
    """
    done = restore(stage, load_checkpoint(run)) if resume else 0
    log = MetricsLog(
        run / "metrics.jsonl",
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        resume_step=done if done else -1,  # a run that died before its first save starts over
    )
    accumulator = Accumulator()
    if done == 0:
        hooks.sample(0)
    with log, interruptible() as stopped, suppress(Stopped):
        while done < settings.steps and not stopped.is_set():
            accumulator.add(stage.iteration(done))
            done += 1
            if done % settings.log_every == 0 or done == settings.steps:
                means = accumulator.means()
                accumulator.reset()
                log.write(done, means)
                hooks.progress(done, means)
            if hooks.watch_every and done % hooks.watch_every == 0:
                log.write(done, hooks.watch(done))
            if hooks.sample_every and done % hooks.sample_every == 0:
                hooks.sample(done)
            if done % settings.save_every == 0 or done == settings.steps or stopped.is_set():
                save(stage, run, done, settings)
    if stopped.is_set():  # it may have been in a wait, which is not followed by the save above
        save(stage, run, done, settings)
    return done


def save(stage: Stage, run: Path, done: int, settings: LoopSettings) -> None:
    """Weights, EMA and optimizer states as one atomic checkpoint."""
    tensors = dict(stage.roles.state())
    for name, updater in stage.updaters.items():
        tensors[f"optimizer_{name}"] = updater.state()
    save_checkpoint(run, done, tensors, {"step": done, **settings.facts}, settings.keep)


def restore(stage: Stage, checkpoint: Checkpoint) -> int:
    """Puts a checkpoint's state back; returns its step."""
    stage.roles.load(checkpoint.tensors)
    for name, updater in stage.updaters.items():
        updater.load(dict(checkpoint.tensors[f"optimizer_{name}"]))
    return checkpoint.step
