"""What stage 2 stands on: stage 1's weights, where they are and what must fit of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.sentences import listed
from tiltflow.formats.contract import read_contract
from tiltflow.models.lora_files import lora_mark, read_adapter, student_folder
from tiltflow.models.roles import AdapterSettings, Roles, State, boundaries_of
from tiltflow.models.switch import FEW_STEP, TILT
from tiltflow.training.own_terms import BUILTIN

Grids = tuple[int, ...]
"""Numbers of sampler steps, the smallest first."""


@dataclass(frozen=True)
class Start:
    """What stage 2 takes from stage 1: the EMA's weights, the fake score's, the adapter's shape,
    and the numbers of steps whose boundaries the fake score was trained on, where that is known."""

    few_step: State
    fake_score: State | None
    settings: AdapterSettings | None
    grids: Grids | None = None


def grids_of(state: Mapping[str, Any]) -> Grids | None:
    """The numbers of sampler steps in a checkpoint's state; None in those of versions without."""
    steps = state.get("steps")
    if isinstance(steps, list):
        return tuple(steps)
    return None if steps is None else (steps,)


def load_start(run: Path) -> Start:
    """Stage 1's result: from its run directory, or from an exported LoRA folder.

    A LoRA folder has no fake score: that starts from the teacher again.

    Raises:
        ValueError: if the directory holds neither a complete stage-1 checkpoint nor a LoRA.
    """
    if not (run / "checkpoints").is_dir():
        return lora_start(run)
    checkpoint = load_checkpoint(run)
    if checkpoint.state.get("stage") != "cold_start":
        raise ValueError(f"model.few_step={run} is not a cold_start run")
    adapters = checkpoint.state["adapters"]
    return Start(
        dict(checkpoint.tensors["ema"]),
        dict(checkpoint.tensors["fake_score"]),
        AdapterSettings(**adapters) if adapters else None,
        grids_of(checkpoint.state),
    )


def lora_start(folder: Path) -> Start:
    """An exported LoRA of stage 1's student: on its own, or that of a run that has no checkpoints.

    Raises:
        ValueError: if stage 2's adapter lies beside it, or is what the file holds; as
            `read_adapter`.
    """
    if (folder / "export" / TILT).is_dir():
        raise ValueError(
            f"model.few_step={folder} has stage 2's tilt beside the few-step adapter: give "
            f"{folder / 'export' / FEW_STEP} to begin from stage 1's student, without the tilt"
        )
    settings, weights = read_adapter(folder)
    place = student_folder(folder)
    contract = read_contract(place)
    tilt = contract.hashes.get(TILT) if contract else None
    if tilt is not None and lora_mark(place) == tilt:
        raise ValueError(
            f"model.few_step={folder} holds a tilt: it acts on the few-step adapter that it was "
            "trained on, and is no student without it. Give that adapter, or "
            "`tiltflow export --tilt 1`, which has both in one"
        )
    return Start(weights, None, settings)


def continues(cfg: RunConfig, start: Start | None) -> bool | None:
    """Whether the run trains the adapter that stage 1's fake score had; None where there is no
    question: in stage 1, and of copies."""
    if start is None or cfg.adapters.kind != "lora":
        return None
    return start.fake_score is not None and cfg.tilt.fake_score_start == "continued"


def starting_point(cfg: RunConfig) -> Start | None:
    """What stage 2 stands on: stage 1's result, or where that is gone and the run is resumed, the
    adapters of the run's own checkpoint that were stage 1's.

    Raises:
        ValueError: if neither is there, or the checkpoint does not tell enough of them.
    """
    if cfg.model.few_step is None:
        return None
    run = Path(cfg.model.few_step)
    if run.exists() or not cfg.run.resume:
        return load_start(run)
    checkpoint = load_checkpoint(Path(cfg.run.out), cfg.run.resume_from, tidy=False)
    tensors, adapters = checkpoint.tensors, checkpoint.state.get("few_step_adapters")
    if "few_step" not in tensors or not adapters:
        raise ValueError(f"model.few_step {run} is gone, and the run to resume has no copy of it")
    fake, known = tensors.get("few_step_fake_score"), checkpoint.state.get("fake_score_continued")
    if fake is None and cfg.tilt.fake_score_start == "continued":
        if known is None and adapters != checkpoint.state.get("adapters"):
            raise ValueError(
                f"model.few_step {run} is gone, and the run to resume was made by a version that "
                "does not say whether its fake score has stage 1's adapters.rank and adapters.alpha"
            )
        fake = tensors["fake_score"] if known else None
    settings = AdapterSettings(**adapters)
    return Start(tensors["few_step"], fake, settings, grids_of(checkpoint.state))


def check_grids(cfg: RunConfig, start: Start | None) -> None:
    """Whether stage 1's fake scores, where each boundary has one, are of this run's boundaries.
    They are told apart by their number alone, so those of steps 1 and 3 would pass for those of 4.

    Raises:
        ValueError: if they are of other grids.
    """
    if start is None or start.fake_score is None or start.grids is None:
        return
    several = cfg.train.fake_scores == "per_boundary" and boundaries_of(start.fake_score)
    if several and start.grids != cfg.sampler.grids:
        raise ValueError(
            f"model.few_step={cfg.model.few_step} has a fake score for each boundary of "
            f"sampler.steps {listed(start.grids)}, but here sampler.steps is "
            f"{listed(cfg.sampler.grids)}: give the same, or train.fake_scores=shared"
        )


def below(cfg: RunConfig, roles: Roles) -> State | None:
    """Stage 1's weights that stage 2 reads for as long as it trains: the frozen adapters under its
    own, or of full copies the reference, where the KL or a term of the user's own compares with it.

    None where nothing does: copies have their start in their own checkpoints.
    """
    if "few_step" in roles.frozen:
        return roles.frozen["few_step"].state()
    compared = cfg.tilt.kl > 0 or bool(set(cfg.tilt.terms) - set(BUILTIN))
    return roles.reference.state() if roles.reference is not None and compared else None
