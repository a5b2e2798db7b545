"""`tiltflow train`: one run directory from one recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tiltflow.config.load import RunConfig, dump_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint, point_latest
from tiltflow.core.disk import write_whole
from tiltflow.core.distributed import Ranks, ranks_of_job
from tiltflow.core.errors import NonFiniteError
from tiltflow.core.run_lock import RunLock, refuse_if_held
from tiltflow.core.sizes import said
from tiltflow.evaluation.watch.probes import FixedPrompts
from tiltflow.evaluation.watch.watch import Watch
from tiltflow.models.medium import Medium
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.files import unread_shards
from tiltflow.models.pipelines.storage import lost_notices
from tiltflow.models.roles import Role
from tiltflow.setup.assemble import build_rewards
from tiltflow.setup.build import Build, attention_for, build_stage, device_of
from tiltflow.setup.checks import Subject, check_run
from tiltflow.setup.manifest import defaults_by_key, manifest_of
from tiltflow.setup.run_directory import start_of, with_absolute_paths
from tiltflow.setup.start_notices import start_notices
from tiltflow.setup.starts import below
from tiltflow.setup.watch_facts import held_out_digests
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.export import export_checkpoint
from tiltflow.tasks.failures import explained, resume_command
from tiltflow.tasks.planning import chosen, device_bytes, is_auto
from tiltflow.tasks.progress import Terminal
from tiltflow.tasks.sheets import drop_sheets, save_sheet
from tiltflow.tasks.watching import build_watch, held_out, look
from tiltflow.training.changes import HELD_OUT
from tiltflow.training.loop import Hooks, LoopSettings, Watched, train
from tiltflow.training.tilt import Tilt

COLUMNS = 8
"""Samples side by side in a run's pictures."""


def run_training(cfg: RunConfig, console: Console) -> Path:
    """`train_run` with its progress on a console.

    Raises:
        as `train_run`.
    """
    with Terminal(console, "dim") as callbacks:
        return train_run(cfg, callbacks)


def train_run(cfg: RunConfig, callbacks: Callbacks = SILENT) -> Path:
    """Trains what the config says and returns the run directory.

    Under torchrun every rank calls this; rank 0 speaks and writes.

    Raises:
        ValueError: if the directory already holds a run and `run.resume` is false, or there is
            nothing to resume; and whatever the config's files have wrong.
        MemoryError, OSError: out of memory or disk, with what helps.
        PeerLost: if another rank is gone.
    """
    out, device = Path(cfg.run.out), device_of(cfg.run.device)
    refuse_if_held(out)
    start_of(cfg, out)  # an early word; what counts is what the lock's holder finds
    subject = check_run(cfg)
    attention = attention_for(cfg, device)
    job = ranks_of_job(device, cfg.run.rank_timeout)
    with job as ranks, attention, explained(cfg, ranks.size), _locked(out, ranks) as hold:
        return _run(subject, out, hold, callbacks if ranks.main else SILENT, ranks)


@contextmanager
def _locked(out: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Rank 0's lock of the run directory, which the others wait for; checks that it still holds.

    Raises:
        ValueError: on every rank, if another process has the directory.
    """
    with ExitStack() as stack:
        refused: ValueError | None = None
        check: Callable[[], None] = lambda: None  # noqa: E731
        if ranks.main:
            try:
                check = stack.enter_context(RunLock(out)).check
            except ValueError as error:
                refused = error
        if ranks.any(refused is not None):
            raise refused or ValueError(f"rank 0 has not been given the run directory {out}")
        yield check


def _run(
    subject: Subject,
    out: Path,
    hold: Callable[[], None],
    callbacks: Callbacks,
    ranks: Ranks,
) -> Path:
    cfg = subject.cfg
    start = start_of(cfg, out)
    if ranks.from_main(start or 0) != (start or 0):
        raise ValueError(f"the ranks see different files in {out}: it must be on a shared disk")

    say = callbacks.notice
    memory = device_bytes(device_of(cfg.run.device)) if is_auto(cfg) else None
    planned = chosen(cfg, out, start is not None, memory, ranks, say)
    build = build_stage(
        planned, say, sets=subject.prompts, pipelines=subject.pipelines, ranks=ranks
    )
    manifest = _manifest(subject, build)
    for line in _warnings(subject, build, manifest["generator_base"] or manifest["base"]):
        say(f"warning: {line}")
    _say_other_size(build, say)
    settings = _loop_settings(cfg, build.facts.as_json() | {"manifest": manifest})
    callbacks.begin(cfg.stage, start or 0, cfg.train.steps)

    def begin() -> None:
        if start:
            say(f"going on from step {start} of {cfg.train.steps}")
        if ranks.main:
            if start is not None and latest_step(out) != start:
                point_latest(out, start)  # a kill before the next save leaves this branch
            # As the log drops its later lines; without a save (or after step 0) all begins anew.
            drop_sheets(out, start or -1)
            _write_config(cfg, out)

    plain = Hooks(
        step=lambda done: callbacks.step(done, cfg.train.steps),
        progress=_saying_target(cfg.tilt.reward_target, callbacks),
        notice=say,
        begin=begin,
        before_save=hold,
        saved=callbacks.checkpoint,
    )
    hooks, watch, more = _hooks(planned, build, out, start or 0, plain, callbacks, ranks)
    settings = replace(settings, facts={**settings.facts, **more})
    done = train(build.running, out, settings, hooks, start is not None, ranks)
    if watch is not None and watch.alarmed and cfg.watch.stop:
        callbacks.stopped(
            done,
            f"the watch ended the run; checkpoints/latest is step {done}, the last without an "
            "alarm (docs/watch.md says how to go on)",
        )
    elif done < cfg.train.steps:
        command = resume_command(out, ranks.size)
        callbacks.stopped(done, f"stopped at step {done} and saved; go on with: {command}")
        return out
    if ranks.main and cfg.model.has_files and cfg.adapters.kind == "lora":
        kept, place = load_checkpoint(out), out / "export"
        export_checkpoint(cfg, kept, place, pipelines=subject.pipelines, callbacks=callbacks)
    return out


def _warnings(subject: Subject, build: Build, base: str | None) -> list[str]:
    """What a user should know of the model and the settings as a run starts; `base` is the
    generator's, by its hash."""
    cfg = subject.cfg
    lines = unread_shards(subject.pipelines.model) if cfg.model.has_files else []
    if isinstance(build.backbone, PipelineBackbone):
        lines += lost_notices(build.backbone.lost)
    return lines + start_notices(cfg, subject.prompts.train, subject.pipelines, base)


def _manifest(subject: Subject, build: Build) -> dict[str, Any]:
    """What the run depends on, with what reward servers say that their rewards are made of."""
    few_step = below(subject.cfg, build.stage.roles)
    found = manifest_of(subject.cfg, subject.prompts, few_step, subject.pipelines)
    if isinstance(build.stage, Tilt):
        found["rewards"] |= build.stage.rewards.contents
    return found


def _loop_settings(cfg: RunConfig, facts: Mapping[str, Any]) -> LoopSettings:
    return LoopSettings(
        steps=cfg.train.steps,
        log_every=cfg.log.every,
        save_every=cfg.checkpoint.every,
        keep=cfg.checkpoint.keep,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
        stop_on_alarm=cfg.watch.stop,
        facts=facts,
        defaults=defaults_by_key(),
        skip=cfg.train.skip_nonfinite,
        resume_from=cfg.run.resume_from,
    )


def _say_other_size(build: Build, say: Callable[[str], None]) -> None:
    """A line if samples and the watch are of pictures that nothing is trained on."""
    sizes, backbone = build.facts.sizes, build.backbone
    if not sizes or build.fixed is None or not isinstance(backbone, PipelineBackbone):
        return
    if backbone.resolution not in sizes:
        say(
            f"warning: samples and the watch are of {said(backbone.resolution)} pixels "
            "(model.resolution), which data.buckets does not have"
        )


def _saying_target(
    target: float, callbacks: Callbacks
) -> Callable[[int, Mapping[str, float]], None]:
    """`callbacks.metrics`, and a line the first time that the rewards move under half of the
    samples: an objective of another scale than `target` trains on in name alone."""
    told = False

    def metrics(step: int, means: Mapping[str, float]) -> None:
        nonlocal told
        share = means.get("generator/at_target", 0.0)
        if share > 0.5 and not told:
            told = True
            callbacks.notice(
                f"warning: at step {step} {share:.0%} of the samples score above "
                f"tilt.reward_target={target:g}, where the rewards have no gradient "
                "(docs/rewards.md); a higher target has one"
            )
        callbacks.metrics(step, means)

    return metrics


def _write_config(cfg: RunConfig, out: Path) -> None:
    """`config.yaml` in one step: a full disk or a kill leaves the old one whole.

    Going on, the checkpoint to go on from, and another plan are not asked for again by who starts
    from this file; and its paths mean the same from every directory.
    """
    asked = {"resume": False, "resume_from": "latest", "replan": False}
    run = cfg.run.model_copy(update=asked)
    resolved = with_absolute_paths(cfg).model_copy(update={"run": run})
    write_whole(out / "config.yaml", dump_config(resolved))


def _save_sheet(
    fixed: FixedPrompts,
    ema: Role,
    count: int,
    medium: Medium,
    out: Path,
    done: int,
    callbacks: Callbacks,
    ranks: Ranks,
) -> None:
    """The first `count` samples after step `done`, as one picture in `out`/samples by rank 0."""
    try:
        images = fixed.images(ema, count)
    except NonFiniteError as error:
        raise NonFiniteError(f"step {done}: {error}") from error
    if ranks.main:
        assert medium.sheet is not None
        picture = medium.sheet(medium.rounded(images), COLUMNS)
        callbacks.samples(done, save_sheet(out, done, picture, fixed.encoded.prompts[:count]))


def _hooks(
    cfg: RunConfig,
    build: Build,
    out: Path,
    start: int,
    plain: Hooks,
    callbacks: Callbacks,
    ranks: Ranks,
) -> tuple[Hooks, Watch | None, dict[str, Any]]:
    """`plain` hooks, and sample grids, held-out rewards and the watch, all on the same fixed
    prompts and noise; and what the checkpoints say of them."""
    watched = cfg.watch.rewards
    medium = build.backbone.medium
    pictures = cfg.log.samples_every > 0 and medium.sheet is not None
    if build.fixed is None or not (pictures or watched):
        return plain, None, {}
    prompts = build.fixed.prompts
    fixed = FixedPrompts(
        build.fixed,
        build.backbone.few_step_sigmas(cfg.sampler.most),
        cfg.sampler.eta,
        min(cfg.train.micro, 64),
        ranks,
    )
    ema = build.stage.roles.ema

    def sample(done: int) -> None:
        if pictures:
            shown = min(cfg.log.samples, len(prompts))
            _save_sheet(fixed, ema, shown, medium, out, done, callbacks, ranks)

    hooks = replace(
        plain,
        sample=sample,
        sample_every=cfg.log.samples_every if pictures else 0,
        watch_every=cfg.watch.every if watched else 0,
    )
    if not watched:
        return hooks, None, {}
    if cfg.stage == "tilt":
        watch = build_watch(cfg, build, fixed, out, start, callbacks.notice, ranks)
        seeing = replace(
            hooks, watch=lambda done: look(watch, done, callbacks), good=lambda: watch.good
        )
        return seeing, watch, {}
    rewards = build_rewards(watched, build.backbone)
    n = min(cfg.watch.prompts, len(prompts))
    # stage 1 has nothing to hack: figures, no rules, and hence no reference to measure first
    looking = replace(
        hooks,
        watch=lambda done: Watched(held_out(fixed, ema, rewards, n)),
        good=lambda: 0,
    )
    return looking, None, {HELD_OUT: held_out_digests(cfg, build.backbone, fixed, n, rewards)}
