"""What `tiltflow doctor` and `tiltflow train` look at before a weight loads or a directory is made.

One list, in order. `train` stops at the first check that fails, `doctor` goes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tiltflow.config.load import (
    Later,
    PromptSets,
    RunConfig,
    check_few_step,
    check_model_files,
    check_reward_files,
    read_prompts,
)
from tiltflow.core.metrics import check_sinks
from tiltflow.core.paths import check_folder, embedding_cache
from tiltflow.data.prompts import Prompt
from tiltflow.formats.folder import check_export_folder
from tiltflow.formats.writing import check_exportable
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.words import check_text_packages
from tiltflow.rewards.fitting import check_prompts_fit, check_reward_imports
from tiltflow.setup.build import device_of
from tiltflow.setup.disk_room import check_disk_room
from tiltflow.setup.held_out import check_held_out
from tiltflow.setup.model_checks import (
    check_adapters,
    check_guided_from,
    check_model,
    check_sizes,
)
from tiltflow.setup.watch_prompts import looked_at, too_few_texts
from tiltflow.training.objective import check_objective
from tiltflow.training.own_terms import check_terms


@dataclass(frozen=True)
class Subject:
    """A config, and what its checks have read on the way."""

    cfg: RunConfig

    @cached_property
    def prompts(self) -> PromptSets:
        """The prompts, read once.

        Raises:
            ValueError: as `read_prompts`.
        """
        return read_prompts(self.cfg)

    @property
    def looked_at(self) -> list[Prompt]:
        """The held-out prompts, of which samples and the watch take the first."""
        return looked_at(self.cfg, self.prompts)

    @cached_property
    def pipelines(self) -> Pipelines:
        """The model's directories, whose files are read once."""
        return self.cfg.model.pipelines


@dataclass(frozen=True)
class Check:
    """A name, and what raises a ValueError of one sentence where something is not in order.

    `needs` are the checks without which this one has nothing to look at.
    """

    name: str
    run: Callable[[Subject], object]
    needs: tuple[str, ...] = ()


def _check_cache(cfg: RunConfig) -> None:
    """That embeddings can be kept; a folder that is there may be one that is only read."""
    folder = embedding_cache(cfg.data.cache)
    if folder is None or folder.is_dir() or not cfg.model.has_files:
        return
    try:
        check_folder("data.cache", folder)
    except ValueError as error:
        raise ValueError(f"{error}; give another folder, or data.cache=off") from error


def _check_own(cfg: RunConfig) -> None:
    """That what the stage is to follow can be found, and takes its settings."""
    if cfg.stage == "cold_start":
        check_objective(cfg.cold_start.objective, cfg.cold_start.objective_options)
    else:
        check_terms(cfg.tilt.terms)


def _check_reward_imports(cfg: RunConfig) -> None:
    """That the code and packages of all rewards are there."""
    given = {**cfg.watch.rewards, **cfg.rewards}
    check_reward_imports(given, [name for name, one in given.items() if one.path is not None])


def _check_prompts_fit(on: Subject) -> None:
    """That every reward can read the prompts that it will score."""
    fixed = on.looked_at[: on.cfg.watch.prompts]
    for rewards, prompts in ((on.cfg.rewards, on.prompts.train), (on.cfg.watch.rewards, fixed)):
        check_prompts_fit({name: of.path for name, of in rewards.items()}, prompts)


def _check_watch(on: Subject) -> None:
    """That a watch which may end the run can raise an alarm; any other says what it lacks later
    (`tasks/watching.py`)."""
    if on.cfg.watch.stop:
        few = too_few_texts(on.cfg.watch, [prompt.text for prompt in on.looked_at])
        if few is not None:
            raise ValueError(f"watch.stop is true, and {few}")


def check_export(cfg: RunConfig, pipelines: Pipelines | None = None) -> None:
    """Whether what a run of this config trains can be exported into its directory at its end.

    Raises:
        ValueError: as `check_exportable`.
    """
    if not cfg.model.has_files:
        return
    out, model = Path(cfg.run.out) / "export", (pipelines or cfg.model.pipelines).here("model")
    check_export_folder(out)
    if model is not None:  # else it is the hub's to give
        check_directory(model)
        check_exportable(model, cfg.sampler.grids, cfg.sampler.eta, out)


def _check_text_packages(on: Subject) -> None:
    """That the packages that prompts go through are there; a pipeline of the hub's is not yet."""
    model = on.pipelines.here("model") if on.cfg.model.has_files else None
    if model is not None:
        check_text_packages(model.family)


CHECKS: tuple[Check, ...] = (
    Check("device", lambda on: device_of(on.cfg.run.device)),
    Check("packages", lambda on: check_sinks(on.cfg.log.tensorboard, on.cfg.log.wandb)),
    Check("terms", lambda on: _check_own(on.cfg)),
    Check("model", lambda on: check_model_files(on.cfg, on.pipelines)),
    Check("packages of prompts", _check_text_packages, needs=("model",)),
    Check("weights", lambda on: check_model(on.cfg, on.pipelines), needs=("model",)),
    Check("stage 1", lambda on: check_few_step(on.cfg)),
    Check("rewards' files", lambda on: check_reward_files(on.cfg)),
    Check("rewards", lambda on: _check_reward_imports(on.cfg)),
    Check("held-out rewards", lambda on: check_held_out(on.cfg), needs=("rewards",)),
    Check("prompts", lambda on: on.prompts),
    Check(
        "sizes",
        lambda on: check_sizes(on.cfg, on.prompts.train, on.pipelines),
        needs=("model", "weights", "prompts"),
    ),
    Check(
        "negative prompts",
        lambda on: check_guided_from(on.cfg, on.prompts, on.pipelines),
        needs=("model", "weights", "prompts"),
    ),
    Check("prompts and rewards", _check_prompts_fit, needs=("rewards", "prompts")),
    Check("prompts and watch", _check_watch, needs=("prompts",)),
    Check("run directory", lambda on: check_folder("run.out", Path(on.cfg.run.out))),
    Check(
        "adapters",
        lambda on: check_adapters(on.cfg, on.pipelines),
        needs=("model", "weights", "stage 1"),
    ),
    Check(
        "room on the disk",
        lambda on: check_disk_room(on.cfg, on.pipelines),
        needs=("model", "run directory", "adapters"),
    ),
    Check("embedding cache", lambda on: _check_cache(on.cfg)),
    Check(
        "export", lambda on: check_export(on.cfg, on.pipelines), needs=("model", "run directory")
    ),
)


@dataclass(frozen=True)
class Finding:
    """What one check found: nothing wrong (`error` None), or a sentence.

    `note`: the sentence is of something that a run before this one will make. `seen` False: not
    looked at, because a check that it needs has failed.
    """

    name: str
    error: ValueError | None = None
    note: bool = False
    seen: bool = True

    @property
    def failed(self) -> bool:
        return self.error is not None and not self.note


def findings(subject: Subject) -> Iterator[Finding]:
    """Every check's finding, in order."""
    failed: set[str] = set()
    for check in CHECKS:
        if failed & set(check.needs):
            yield Finding(check.name, seen=False)
            continue
        try:
            check.run(subject)
        except ValueError as error:
            failed.add(check.name)
            yield Finding(check.name, error, isinstance(error, Later))
        else:
            yield Finding(check.name)


def check_run(cfg: RunConfig) -> Subject:
    """Goes through the list up to the first thing that is wrong; gives what was read on the way.

    Raises:
        ValueError: in one sentence, what is wrong.
    """
    subject = Subject(cfg)
    for found in findings(subject):
        if found.error is not None:
            raise found.error
    return subject
