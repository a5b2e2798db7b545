"""A run directory as a run begins in it or goes on: where from, and with which paths."""

from __future__ import annotations

import os
from pathlib import Path

from tiltflow.config.load import load_config
from tiltflow.config.schema import RewardConfig, RunConfig
from tiltflow.core.checkpoint import latest_step
from tiltflow.core.metrics import read_metrics
from tiltflow.core.paths import PACKAGED, misspelt
from tiltflow.data.prompts import PACKAGED as PACKAGED_PROMPTS


def start_of(cfg: RunConfig, out: Path) -> int | None:
    """The step that a run in the directory `out` goes on from, None for one that begins.

    Raises:
        ValueError: if there is a run that `run.resume` does not ask to go on with, or it asks to
            go on and there is nothing to go on with, or not the checkpoint that it names.
    """
    found, run = latest_step(out), cfg.run
    if found is not None and not run.resume:
        raise ValueError(
            f"{out} already holds a run at step {found}: give run.resume=true to go on with it, "
            "or another run.out"
        )
    if run.resume_from != "latest":
        if not (out / "checkpoints" / run.resume_from).is_dir():
            there = "no checkpoint at all" if found is None else f"its latest is step {found}"
            raise ValueError(f"run.resume_from: there is no {run.resume_from} in {out}, {there}")
        return int(run.resume_from.removeprefix("step-"))
    if found is None:
        _nothing_saved(out, must=run.resume is True)
    return found


def _nothing_saved(out: Path, must: bool) -> None:
    """That a run may begin there: there is none, or one that ended before a save.

    Raises:
        ValueError: if there is none and there `must` be one, or it has lost its checkpoints.
    """
    if not (out / "config.yaml").is_file():
        if must:
            raise ValueError(
                f"there is nothing to resume in {out}: leave run.resume out to begin a run there, "
                "or give run.resume=auto to begin where there is none and go on where there is"
            )
        return
    every = load_config(str(out / "config.yaml")).checkpoint.every
    log = out / "metrics.jsonl"
    steps = [row["step"] for row in read_metrics(log)] if log.is_file() else []
    if steps and max(steps) > every:
        raise ValueError(
            f"{out} has no checkpoint to resume from, though its log reaches step {max(steps)}: "
            "bring back its checkpoints folder, or take another run.out"
        )


def with_absolute_paths(cfg: RunConfig) -> RunConfig:
    """The config with every path that is there made absolute.

    So its file means the same from every directory. Packaged names and hub ids stay.
    """

    def rewards(table: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        return {n: r.model_copy(update={"path": _absolute(r.path)}) for n, r in table.items()}

    model, data, watch = cfg.model, cfg.data, cfg.watch
    paths = _MODEL_PATHS if model.has_files else ("generator_path", "few_step")
    cache = data.cache
    changes = {
        "model": model.model_copy(update={n: _absolute(getattr(model, n)) for n in paths}),
        "data": data.model_copy(
            update={
                "prompts": _prompts(data.prompts),
                "eval_prompts": _prompts(data.eval_prompts),
                # made where it is not there yet
                "cache": cache if cache in (None, "off") else _place(str(cache)),
            }
        ),
        "rewards": rewards(cfg.rewards),
        "watch": watch.model_copy(
            update={"rewards": rewards(watch.rewards), "clip": _absolute(watch.clip)}
        ),
    }
    return cfg.model_copy(update=changes)


_MODEL_PATHS = ("path", "generator_path", "few_step")


def _prompts(source: str | None) -> str | None:
    return source if source in PACKAGED_PROMPTS else _absolute(source)


def _absolute(path: str | None) -> str | None:
    if path is None or path.startswith(PACKAGED) or not os.path.exists(os.path.expanduser(path)):
        return path
    return _place(path)


def _place(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def check_run(path: Path) -> None:
    """
    Raises:
        ValueError: if `path` is no run directory; runs in it are named.
    """
    if (path / "config.yaml").is_file():
        return
    if not path.is_dir():
        why = "it is a file" if path.exists() else f"there is nothing there{misspelt(str(path))}"
        raise ValueError(f"{path} is no run directory: {why}")
    inner = sorted(str(each.parent) for each in path.glob("*/config.yaml"))
    runs = f": the runs in it are {' and '.join(inner)}" if inner else ""
    raise ValueError(f"{path} is no run directory (it has no config.yaml){runs}")
