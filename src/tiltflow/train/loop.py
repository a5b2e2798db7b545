"""The page around a stage: resume, iterate, log, sample, save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tiltflow.checkpoint import Checkpoint, load_checkpoint, point_latest, save_checkpoint
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
class Watched:
    """What a watch saw: figures for the log, and its alarms as sentences by rule."""

    metrics: Mapping[str, float]
    alarms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hooks:
    """What happens around the iterations. `sample` and `watch` get the number of done steps.

    `good` is the last step at which the watch saw nothing wrong, None before its first look.
    """

    progress: Callable[[int, dict[str, float]], None] = lambda done, metrics: None
    sample: Callable[[int], None] = lambda done: None
    watch: Callable[[int], Watched] = lambda done: Watched({})
    good: Callable[[], int | None] = lambda: None
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
    stop_on_alarm: bool = False
    """End at the last good checkpoint when the watch raises an alarm; each clean look is saved."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts that go into each checkpoint's state (stage, adapters)."""


def train(stage: Stage, run: Path, settings: LoopSettings, hooks: Hooks, resume: bool) -> int:
    """Runs (or goes on with) a stage in the directory `run`; returns the step of its result.

    Stopped by SIGINT or SIGTERM, it saves and returns early. Ended by an alarm of the watch, it
    points `latest` at the last good checkpoint and returns that one's step. Counted randomness
    makes a resumed run equal to an uninterrupted one.
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
    with log, interruptible() as stopped:
        if hooks.watch_every and hooks.good() is None:  # the reference of all later looks
            look(log, hooks, done)
            if settings.stop_on_alarm:
                save(stage, run, done, settings, hooks.good())
        while done < settings.steps and not stopped.is_set():
            accumulator.add(stage.iteration(done))
            done += 1
            if done % settings.log_every == 0 or done == settings.steps:
                means = accumulator.means()
                accumulator.reset()
                log.write(done, means)
                hooks.progress(done, means)
            if hooks.sample_every and done % hooks.sample_every == 0:
                hooks.sample(done)
            looked = bool(hooks.watch_every) and done % hooks.watch_every == 0
            alarms = look(log, hooks, done) if looked else {}
            if alarms and settings.stop_on_alarm:
                return end(log, run, done, hooks)
            due = done % settings.save_every == 0 or done == settings.steps or stopped.is_set()
            if due or (looked and settings.stop_on_alarm):
                save(stage, run, done, settings, hooks.good())
    return done


def look(log: MetricsLog, hooks: Hooks, done: int) -> Mapping[str, str]:
    """One look of the watch, written to the log; its alarms."""
    watched = hooks.watch(done)
    log.write(done, watched.metrics)
    if watched.alarms:
        log.say(done, {f"alarm/{rule}": text for rule, text in watched.alarms.items()})
    return watched.alarms


def end(log: MetricsLog, run: Path, done: int, hooks: Hooks) -> int:
    """Points `latest` at the last good checkpoint, says so in the log, and gives its step."""
    good = hooks.good()
    assert good is not None  # the first look has nothing to be compared with
    kept = point_latest(run, good)
    log.say(done, {"watch/ended": f"an alarm at step {done} ended the run; step {kept} is kept"})
    return kept


def save(
    stage: Stage, run: Path, done: int, settings: LoopSettings, good: int | None = None
) -> None:
    """Weights, EMA and optimizer states as one atomic checkpoint; that of step `good` is kept."""
    tensors = dict(stage.roles.state())
    for name, updater in stage.updaters.items():
        tensors[f"optimizer_{name}"] = updater.state()
    facts = {"step": done, **settings.facts}
    save_checkpoint(run, done, tensors, facts, settings.keep, good)


def restore(stage: Stage, checkpoint: Checkpoint) -> int:
    """Puts a checkpoint's state back; returns its step."""
    stage.roles.load(checkpoint.tensors)
    for name, updater in stage.updaters.items():
        updater.load(dict(checkpoint.tensors[f"optimizer_{name}"]))
    return checkpoint.step


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second SIGINT interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    for s in before:
        signal.signal(s, handle)
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
