"""What is worth a line before a run trains. Of stage 1: boundaries that no iteration reaches, a
setting that its objective does not read. Of what stage 2 starts from: that it has not ended,
another base, other sampling. None of it is an error: all of these are also done on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig
from tiltflow.core.disk import parse_json
from tiltflow.core.latest import latest_name
from tiltflow.core.paths import resolve_path
from tiltflow.core.sentences import listed
from tiltflow.core.sizes import Resolution, said, same_as
from tiltflow.data.prompts import Prompt
from tiltflow.formats.contract import Contract, read_contract
from tiltflow.models.lora_files import student_folder
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.guidance import guided_turbo
from tiltflow.setup.assemble import buckets_of
from tiltflow.setup.model_checks import can_look, meta_of
from tiltflow.setup.starts import grids_of
from tiltflow.training.objective import BUILTIN

STEPS, ETA, GUIDANCE = "sampler.steps", "sampler.eta", "model.student_guidance"
SIZES, LENGTH = "model.resolution", "model.max_sequence_length"
Sampling = Mapping[str, tuple[Any, ...]]
"""How a student is sampled, by setting: all that it is trained for, where None is the model's own.
What is not known is not there."""


@dataclass(frozen=True)
class Made:
    """What stage 1 says of itself: the base's fingerprint, the step that it is at and those that
    it was to have (None where it is not said, as in an export), how its student was sampled."""

    base: str | None = None
    step: int | None = None
    steps: int | None = None
    sampling: Sampling = field(default_factory=dict)


def start_notices(
    cfg: RunConfig, prompts: Sequence[Prompt], pipelines: Pipelines, base: str | None = None
) -> list[str]:
    """Lines on the teacher, and on stage 1's settings or what stage 2 starts from; none of the
    latter where a run goes on from its own copy.

    `prompts` are those that are trained on, which may name sizes; with `base`, the fingerprint of
    the student's base here, another one is said.

    Raises:
        ValueError: as `made_by`.
    """
    few_step, lines = cfg.model.few_step, _of_teacher(cfg, pipelines)
    if cfg.stage == "cold_start":
        return lines + list(_of_stage_1(cfg))
    if few_step is None or not Path(resolve_path(few_step)).is_dir():
        return lines
    made, place = made_by(Path(resolve_path(few_step))), f"model.few_step {few_step}"
    if made.step is not None and made.steps is not None and made.step < made.steps:
        lines.append(f"{place} is stage 1 at step {made.step:,} of {made.steps:,}, not at its end")
    if base is not None and made.base not in (None, base):
        lines.append(
            f"{place} was trained on a base whose weights have the hash {str(made.base)[:12]}, but "
            f"those here have {base[:12]}"
        )
    return lines + _other_sampling(place, made.sampling, sampling_of(cfg, prompts), cfg, pipelines)


def _of_teacher(cfg: RunConfig, pipelines: Pipelines) -> list[str]:
    model = cfg.model
    if "turbo" not in model.path.lower() or not can_look(cfg, pipelines):
        return []
    backbone, path = meta_of(cfg, pipelines), resolve_path(model.path)
    line = guided_turbo(path, backbone, model.guidance, "model.guidance=1")
    return [] if line is None else [line]


def _of_stage_1(cfg: RunConfig) -> Iterator[str]:
    steps, settings, last = cfg.train.steps, cfg.cold_start, cfg.sampler.most
    reached = min(1 + (steps - 1) // settings.phase, last)
    if settings.boundary_order == "phased" and reached < last:
        yield (
            f"train.steps {steps:,} ends in phase {reached} of {last} (cold_start.phase "
            f"{settings.phase:,}): no later boundary is trained, so neither is the image"
        )
    if cfg.train.boundary_power and settings.objective not in BUILTIN:
        yield (
            f"train.boundary_power {cfg.train.boundary_power:g} weighs AC-DMD's gradient, and not "
            f"that of {settings.objective}, which weighs itself"
        )


def made_by(few_step: Path) -> Made:
    """What a stage-1 run's latest checkpoint says, or an exported LoRA's contract.

    Raises:
        ValueError: as `read_contract`, or if the checkpoint's state is no JSON.
    """
    folder = few_step / "checkpoints"
    name = latest_name(folder)
    if name is None:
        contract = read_contract(student_folder(few_step))
        return Made() if contract is None else _of_contract(contract)
    state = parse_json((folder / name / "state.json").read_text(encoding="utf-8"))
    return _of_state(state if isinstance(state, dict) else {})


def _of_contract(contract: Contract) -> Made:
    sampling = {
        STEPS: contract.trained_steps,
        ETA: (contract.eta,),
        GUIDANCE: (contract.guidance,),
        SIZES: contract.trained_sizes,
        LENGTH: (contract.max_sequence_length,),
    }
    return Made(base=contract.base.hash, sampling=sampling)


def _of_state(state: Mapping[str, Any]) -> Made:
    """A checkpoint's state, of a version that may have kept less."""
    manifest = _table(state, "manifest")
    config = _table(manifest, "config")
    model = _table(config, "model")
    sampling: dict[str, tuple[Any, ...]] = {}
    grids = grids_of(state)
    if grids is not None:
        sampling[STEPS] = grids
    for key, table, name in (
        (ETA, state, "eta"),
        (GUIDANCE, state, "student_guidance"),
        (LENGTH, model, "max_sequence_length"),
    ):
        if name in table:
            sampling[key] = (table[name],)
    if "sizes" in state or "resolution" in model:
        sizes = state.get("sizes") or [model["resolution"]]
        sampling[SIZES] = tuple(map(_size, sizes))
    return Made(
        base=manifest.get("generator_base") or manifest.get("base"),
        step=state.get("step"),
        steps=_table(config, "train").get("steps"),
        sampling=sampling,
    )


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _size(value: Any) -> Resolution | None:
    """A size as JSON or a config has it; None is the model's own."""
    return None if value is None else same_as(value)


def sampling_of(cfg: RunConfig, prompts: Sequence[Prompt]) -> Sampling:
    """How a run's student is sampled while it trains."""
    buckets = buckets_of(cfg, prompts)
    sizes = [bucket.size for bucket in buckets] if buckets else [cfg.model.resolution]
    return {
        STEPS: cfg.sampler.grids,
        ETA: (cfg.sampler.eta,),
        GUIDANCE: (cfg.model.student_guidance,),
        SIZES: tuple(map(_size, sizes)),
        LENGTH: (cfg.model.max_sequence_length,),
    }


def _other_sampling(
    place: str, there: Sampling, here: Sampling, cfg: RunConfig, pipelines: Pipelines
) -> list[str]:
    """A line for each setting with something that stage 1's student was not trained for."""
    different = {key for key in there if set(here[key]) != set(there[key])}
    own: Mapping[str, Any] = {}
    if any(None in (*here[key], *there[key]) for key in different):
        own = _own(cfg, pipelines)
    lines = []
    for key in (key for key in here if key in different):
        now, then = ([own.get(key) if v is None else v for v in s[key]] for s in (here, there))
        odd = [value for value in now if value not in then]
        if odd and None not in (*now, *then):
            asked, trained = (listed([_word(v) for v in values]) for values in (odd, then))
            lines.append(f"{key} is {asked}, but {place} was trained with {trained}")
    return lines


def _own(cfg: RunConfig, pipelines: Pipelines) -> Mapping[str, Any]:
    """What None means in a setting, by the model's configuration; empty where that is not here."""
    if not cfg.model.has_files:
        return {GUIDANCE: 1.0}  # a pass without
    if not can_look(cfg, pipelines):
        return {}
    unset = cfg.model.model_copy(update={"resolution": None, "max_sequence_length": None})
    backbone = meta_of(cfg.model_copy(update={"model": unset}), pipelines)
    return {
        GUIDANCE: backbone.student_guidance,
        SIZES: backbone.resolution,
        LENGTH: backbone.sequence,
    }


def _word(value: Any) -> str:
    return said(value) if isinstance(value, tuple) else str(value)
