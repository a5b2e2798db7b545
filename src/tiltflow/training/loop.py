"""The page around a stage: resume, iterate, log, sample, save."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tiltflow.core.checkpoint import Checkpoint, load_checkpoint, point_latest, save_checkpoint
from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.core.interruption import STOPPING, Stopped, interruptible
from tiltflow.core.latest import step_name
from tiltflow.core.metrics import Accumulator, MetricsLog, NoLog
from tiltflow.models.roles import Roles
from tiltflow.training.changes import changes, for_the_log, in_words
from tiltflow.training.optim import NON_FINITE, Guard, Updater


class Stage(Protocol):
    """A stage of training; both of them are one `iteration` and the state behind it."""

    @property
    def roles(self) -> Roles: ...

    @property
    def updaters(self) -> dict[str, Updater]: ...

    @property
    def guard(self) -> Guard: ...

    def iteration(self, step: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Watched:
    """What a watch saw: figures for the log, its alarms as sentences by rule, and what else the log
    is told before the figures."""

    metrics: Mapping[str, float]
    alarms: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hooks:
    """What happens around the iterations. `sample` and `watch` get the number of done steps, and
    `step` after each one: it waits for no device, which may be a little behind.

    `good` is the last step at which the watch saw nothing wrong, None before its first look.
    `notice` gets a sentence for the user. `begin` comes when what there is to go on with has been
    accepted, before anything is written; `before_save` may raise, and nothing is saved then;
    `saved` gets the step of a checkpoint and its directory.
    """

    step: Callable[[int], None] = lambda done: None
    progress: Callable[[int, dict[str, float]], None] = lambda done, metrics: None
    sample: Callable[[int], None] = lambda done: None
    watch: Callable[[int], Watched] = lambda done: Watched({})
    good: Callable[[], int | None] = lambda: None
    notice: Callable[[str], None] = lambda line: None
    begin: Callable[[], None] = lambda: None
    before_save: Callable[[], None] = lambda: None
    saved: Callable[[int, Path], None] = lambda done, path: None
    sample_every: int = 0
    watch_every: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """Iterations in all, and how often (in iterations) to log and to save; `keep` checkpoints.

    `skip` iterations may end in a non-finite number and be passed over before the run stops.
    """

    steps: int
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    skip: int = 0
    resume_from: str = "latest"
    tensorboard: bool = False
    wandb: bool = False
    stop_on_alarm: bool = False
    """End at the last good checkpoint when the watch raises an alarm; each clean look is saved."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts that go into each checkpoint's state (stage, adapters)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of the settings by dotted key, for checkpoints of versions without some of them."""


def train(
    stage: Stage,
    run: Path,
    settings: LoopSettings,
    hooks: Hooks,
    resume: bool,
    ranks: Ranks = ALONE,
) -> int:
    """Runs (or goes on with) a stage in the directory `run`; returns the step of its result.

    Stopped by SIGINT or SIGTERM on any rank, all finish the iteration, rank 0 saves, and the loop
    returns early; from a wait for a reward server at once: an iteration scores before it changes
    anything, so one that waited is begun anew (ranks that wait for that one lose it). Ended by an
    alarm, rank 0 points `latest` at the last good checkpoint, whose step is returned. Counted
    randomness makes a resumed run equal to an uninterrupted one.
    """
    skips, done, accumulator, stop = Skips(settings.skip), 0, Accumulator(), False
    told: Mapping[str, str] = {}
    if resume:
        done, told = resumed(stage, run, settings, skips, hooks, accumulator, ranks)
    saved = partial(save, stage, run, settings, skips, hooks, accumulator)
    hooks.begin()
    if done == 0:
        hooks.sample(0)
    with (
        _log(run, settings, done, ranks) as log,
        interruptible(STOPPING if ranks.main else "") as stopped,
        suppress(Stopped),
    ):
        if told:
            log.say(done, told)
        if hooks.watch_every and hooks.good() is None:
            look(log, hooks, done, ranks)  # the reference of all later looks
            if settings.stop_on_alarm:  # what an alarm would go back to
                saved(done, ranks)
        while done < settings.steps and not stop:
            accumulator.add(skips.iteration(stage, done), stage.guard.refused(done))
            done += 1
            hooks.step(done)
            stop = ranks.any(stopped.is_set())
            logs = done % settings.log_every == 0 or done == settings.steps
            looked = bool(hooks.watch_every) and done % hooks.watch_every == 0
            due = done % settings.save_every == 0 or done == settings.steps or stop
            if logs or looked or due:
                skips.settle(stage)
            if logs:
                _write(log, hooks, done, accumulator, skips, ranks)
            if hooks.sample_every and (done % hooks.sample_every == 0 or done == settings.steps):
                hooks.sample(done)
            alarmed = looked and look(log, hooks, done, ranks)
            if alarmed and settings.stop_on_alarm:
                return end(log, run, done, hooks, ranks)
            if due or (looked and settings.stop_on_alarm):
                saved(done, ranks)
    if stopped.is_set() and not stop:  # in a wait, which no save above follows
        skips.settle(stage)
        if ranks.main:
            _save_alone(saved, done, accumulator, ranks)
    return done


def _write(
    log: MetricsLog | NoLog,
    hooks: Hooks,
    done: int,
    accumulator: Accumulator,
    skips: Skips,
    ranks: Ranks,
) -> None:
    """A line of the log: means over the iterations since the last one, of all ranks."""
    means = accumulator.means(ranks.total) | skips.metrics()
    accumulator.reset()
    log.write(done, means)
    hooks.progress(done, means)


def _save_alone(
    saved: Callable[[int, Ranks], None], done: int, accumulator: Accumulator, ranks: Ranks
) -> None:
    """Rank 0's save while the others are elsewhere, and their parts of the log's sums with them."""
    if ranks.size > 1:
        accumulator.reset()
    saved(done, ALONE)


def _log(run: Path, settings: LoopSettings, done: int, ranks: Ranks) -> MetricsLog | NoLog:
    if not ranks.main:
        return NoLog()
    return MetricsLog(
        run / "metrics.jsonl",
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        resume_step=done if done else -1,  # a run that died before its first save starts over
    )


@dataclass
class Skips:
    """Iterations passed over because a number was not finite: at most `limit` in a run."""

    limit: int
    count: int = 0

    def iteration(self, stage: Stage, step: int) -> dict[str, Tensor]:
        """One iteration, or no metrics where a number that was not finite ended it: a score, or
        one that a term from outside saw. Nothing of its gradients stays; an optimizer step that it
        had made before does.

        Raises:
            NonFiniteError, NonFiniteScore: when the limit is used up.
        """
        try:
            return stage.iteration(step)
        except NON_FINITE as error:
            for updater in stage.updaters.values():  # what its part so far would add to the next
                updater.drop()
            stage.guard.forget(step)  # a refused step of it, too, is of the one that counts here
            self._pass_over(error)
            return {}

    def settle(self, stage: Stage) -> None:
        """Counts the iterations of which the guard has refused an optimizer step: that one and
        the later ones of the iteration did not happen, earlier ones did.

        Raises:
            NonFiniteError: when the limit is used up.
        """
        for error in stage.guard.failures():
            self._pass_over(error)

    def _pass_over(self, error: Exception) -> None:
        self.count += 1
        if self.count > self.limit:
            raise error

    def metrics(self) -> dict[str, float]:
        """The count so far, where skipping is allowed at all."""
        return {"skipped": float(self.count)} if self.limit else {}


def look(log: MetricsLog | NoLog, hooks: Hooks, done: int, ranks: Ranks) -> bool:
    """One look of the watch, written to the log; whether rank 0 saw an alarm.

    Every rank looks at the same samples; the one verdict keeps them in step.
    """
    watched = hooks.watch(done)
    if watched.notes:
        log.say(done, watched.notes)
    log.write(done, watched.metrics)
    if watched.alarms:
        log.say(done, {f"alarm/{rule}": text for rule, text in watched.alarms.items()})
    return ranks.from_main(len(watched.alarms)) > 0


def end(log: MetricsLog | NoLog, run: Path, done: int, hooks: Hooks, ranks: Ranks) -> int:
    """Points `latest` at the last good checkpoint, says so in the log, and gives its step."""
    kept = 0
    if ranks.main:
        good = hooks.good()
        assert good is not None  # the first look has nothing to be compared with
        kept = point_latest(run, good)
    kept = ranks.from_main(kept)
    log.say(done, {"watch/ended": f"an alarm at step {done} ended the run; step {kept} is kept"})
    return kept


def save(
    stage: Stage,
    run: Path,
    settings: LoopSettings,
    skips: Skips,
    hooks: Hooks,
    accumulator: Accumulator,
    done: int,
    ranks: Ranks,
) -> None:
    """Weights, EMA and optimizer states as one atomic checkpoint, the same on every rank, and what
    the next line of the log has so far; written by rank 0.

    The last good one is kept.
    """
    since_log = accumulator.state(ranks.each)
    if not ranks.main:
        return
    hooks.before_save()
    tensors = dict(stage.roles.state())
    for name, updater in stage.updaters.items():
        tensors.setdefault(updater.role.name, updater.role.state())  # what a term trains itself
        tensors[f"optimizer_{name}"] = updater.state()
    state = {"step": done, "skipped": skips.count, "since_log": since_log, **settings.facts}
    hooks.saved(done, save_checkpoint(run, done, tensors, state, settings.keep, hooks.good()))


def _found(run: Path, settings: LoopSettings, ranks: Ranks) -> Checkpoint:
    """The checkpoint to resume from, read by every rank.

    Raises:
        ValueError: if it is missing or torn, naming a whole one.
    """
    try:
        with ranks.main_first():
            return load_checkpoint(run, settings.resume_from, tidy=ranks.main)
    except ValueError as error:
        raise ValueError(f"{error} (run.resume_from=step-XXXXXX goes on from that one)") from error


def resumed(
    stage: Stage,
    run: Path,
    settings: LoopSettings,
    skips: Skips,
    hooks: Hooks,
    accumulator: Accumulator,
    ranks: Ranks,
) -> tuple[int, Mapping[str, str]]:
    """Restores the run's checkpoint; its step, and what has changed since, for the log.

    Raises:
        ValueError: as `restore`, if the checkpoint is missing or torn, or the run's manifest is
            another's.
    """
    checkpoint = _found(run, settings, ranks)
    name = step_name(checkpoint.step)
    try:
        found = changes(checkpoint.state, settings.facts, settings.defaults)
    except ValueError as error:
        raise _foreign(checkpoint, str(error)) from error
    done = restore(stage, checkpoint, settings, skips)
    if found is None and "manifest" in settings.facts:
        hooks.notice(
            f"{name} is of a version that kept no manifest: its base, its prompts and its settings "
            "could not be compared with this run's"
        )
    elif found:
        hooks.notice(f"changed since step {done}: {in_words(found)}")
    go_on(accumulator, checkpoint, ranks)
    return done, for_the_log(found, checkpoint.state, settings.facts, done)


def go_on(accumulator: Accumulator, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Restores what the next line of the log had so far; versions before it kept none.

    Raises:
        ValueError: if that is no such state.
    """
    kept = checkpoint.state.get("since_log", {})
    try:
        if not isinstance(kept, Mapping):
            raise ValueError(f"its since_log is {kept!r}")
        accumulator.load(kept, ranks.rank, ranks.size)
    except ValueError as error:
        raise _foreign(checkpoint, str(error)) from error


def _foreign(checkpoint: Checkpoint, reason: str) -> ValueError:
    return ValueError(f"checkpoint {step_name(checkpoint.step)} is not of this run: {reason}")


def _check_fake_score(roles: Roles, checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    """That the fake score lies on what it was trained on, and its adapter has the strength."""
    key, state = "few_step_fake_score", checkpoint.state
    here, there = key in roles.frozen, key in checkpoint.tensors
    if here != there:
        word = {True: "a fresh adapter on stage 1's", False: "one adapter"}
        raise ValueError(
            f"its fake score is {word[there]}, but here it is {word[here]} (tilt.fake_score_start)"
        )
    own, first = facts.get("adapters"), facts.get("few_step_adapters")
    name = "fake_score_continued"
    if own != first and state.get(name, facts.get(name)) != facts.get(name):
        raise ValueError(
            "its fake score has the rank and α of another stage than here (tilt.fake_score_start, "
            "or a fake score in model.few_step that was there or was not)"
        )


def restore(stage: Stage, checkpoint: Checkpoint, settings: LoopSettings, skips: Skips) -> int:
    """Puts a checkpoint's state back; returns its step.

    Raises:
        ValueError: if the checkpoint is another run's: of another stage, model or adapter.
    """
    try:
        for key in ("stage", "adapters", "few_step_adapters"):
            here, there = settings.facts.get(key), checkpoint.state.get(key)
            if json.dumps(here) != json.dumps(there):
                raise ValueError(f"its {key} is {there}, but here it is {here}")
        _check_fake_score(stage.roles, checkpoint, settings.facts)
        stage.roles.load(checkpoint.tensors)
        own = stage.roles.state()
        for name, updater in stage.updaters.items():
            if updater.role.name not in own:
                updater.role.load(checkpoint.tensors[updater.role.name])
            updater.load(dict(checkpoint.tensors[f"optimizer_{name}"]))
    except (KeyError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise _foreign(checkpoint, reason) from error
    skipped = checkpoint.state.get("skipped", 0)
    if not isinstance(skipped, int) or skipped < 0:
        raise _foreign(checkpoint, f"its skipped is {skipped!r}, which is no count")
    skips.count = skipped
    return checkpoint.step
