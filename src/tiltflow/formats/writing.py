"""What a run leaves for diffusers: LoRA folders, the scheduler, a merged pipeline (DESIGN §2)."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tiltflow.core.sentences import counted, first_sentence
from tiltflow.core.sizes import Resolution
from tiltflow.formats.contract import CONTRACT_KEY, Contract, falling
from tiltflow.formats.folder import check_export_folder
from tiltflow.models.lora_files import check_lora_file, lora_file
from tiltflow.models.pipelines.directory import SIDE_FILE, Pipeline
from tiltflow.models.pipelines.loading import no_bars
from tiltflow.models.pipelines.words import processors_of
from tiltflow.models.roles import AdapterSettings
from tiltflow.models.switch import FEW_STEP, TILT

if TYPE_CHECKING:  # diffusers takes seconds to import, which checks of a run need not wait for
    from diffusers import DiffusionPipeline

    from tiltflow.scheduler import CPSFlowMatchScheduler

STUDENT = "student"
"""What a merged LoRA is called while it is merged."""
LEAST_KEPT = 0.95
"""Of what the adapters change, in a merged transformer of which nothing is said."""
ORIGINS = ("_name_or_path", "name_or_path")
"""Where a part's settings say what directory it was read from."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA folder, which is all of the student's."""

    folder: Path


@dataclass(frozen=True)
class FullWeights:
    """A whole transformer's weights by name."""

    weights: Mapping[str, Tensor]


def exported_adapters(state: Mapping[str, Any]) -> dict[str, tuple[str, AdapterSettings]]:
    """The LoRA folders of an export: the checkpoint's group of weights, and the LoRA's settings.

    Raises:
        ValueError: if the run trained copies, which have no adapters.
    """
    if not state.get("adapters"):
        raise ValueError(
            "this run trained full copies (adapters.kind=copies), so it has no adapters: "
            "export it with --merged"
        )
    adapters = AdapterSettings(**state["adapters"])
    if state["stage"] == "cold_start":
        return {FEW_STEP: ("ema", adapters)}
    below = AdapterSettings(**state["few_step_adapters"])
    return {FEW_STEP: (FEW_STEP, below), TILT: ("ema", adapters)}


def save_adapter(
    pipeline: type[DiffusionPipeline],
    weights: Mapping[str, Tensor],
    settings: AdapterSettings,
    directory: Path,
    contract: Contract | None = None,
) -> None:
    """One adapter through the pipeline's own `save_lora_weights`, its strength in its weights.

    The file has α = rank, so that it acts alike in readers that know its metadata and in those
    that do not, which take a scale of 1. (`.alpha` tensors would say the same, but diffusers'
    loaders of SD3 and FLUX.2 refuse them, and FLUX.1's refuses them beside the metadata.)
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    directory.mkdir(parents=True, exist_ok=True)
    weights, settings = baked(weights, settings)
    facts = {f"transformer.{key}": value for key, value in lora_metadata(settings).items()}
    header = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(facts, indent=2, sort_keys=True),
    }
    if contract is not None:
        header[CONTRACT_KEY] = contract.text()
    pipeline.save_lora_weights(
        str(directory),
        transformer_lora_layers={name: w.detach().cpu() for name, w in weights.items()},
        save_function=lambda tensors, file: save_file(tensors, file, header),
    )


def baked(
    weights: Mapping[str, Tensor], settings: AdapterSettings
) -> tuple[dict[str, Tensor], AdapterSettings]:
    """The same matrix product with α = rank: B times α / rank, in its own precision."""
    scale = settings.alpha / settings.rank
    made = {name: w * scale if ".lora_B." in name else w for name, w in weights.items()}
    return made, replace(settings, alpha=settings.rank)


def few_step_scheduler(
    model: Pipeline,
    eta: float,
    steps: int | Sequence[int] | None = None,
    resolution: Resolution | None = None,
) -> CPSFlowMatchScheduler:
    """The students' scheduler, made from the own scheduler of the pipeline in `model`, for pictures
    or videos of `resolution` (None: square pictures), trained for `steps`, or any of them.

    Raises:
        ValueError: if the pipeline's scheduler is one that CPS cannot follow.
    """
    from tiltflow.scheduler import CPSFlowMatchScheduler

    family = model.family
    given = family.few_step_config(model.json("scheduler/scheduler_config.json"))
    known = inspect.signature(CPSFlowMatchScheduler.__init__).parameters
    config = {key: value for key, value in given.items() if key in known}
    size = list(resolution) if isinstance(resolution, tuple) else None
    patch = model.index.get("patch_size", family.token_patch)
    try:
        trained = list(steps) if isinstance(steps, Sequence) else steps
        return CPSFlowMatchScheduler.from_config(
            config, eta=eta, patch=patch, steps=trained, size=size
        )
    except ValueError as error:
        raise ValueError(f"the scheduler in {model} cannot be a student's: {error}") from error


def check_exportable(model: Pipeline, grids: Sequence[int], eta: float, out: Path) -> None:
    """Whether what a run trains on the pipeline in `model` can be exported to `out`, before it is.

    Raises:
        ValueError: if the scheduler is one that CPS cannot follow, its levels for one of `grids` do
            not fall from 1 to 0, or `out` is a folder that an export cannot replace.
    """
    check_export_folder(out)
    scheduler = few_step_scheduler(model, eta)
    for steps in grids:
        _check_levels(scheduler, steps, model)


def _check_levels(scheduler: CPSFlowMatchScheduler, steps: int, model: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of a division by 0: what comes of it is seen
        dynamic = scheduler.config.use_dynamic_shifting
        scheduler.set_timesteps(steps, mu=1.0 if dynamic else None)
    levels = [float(level) for level in scheduler.sigmas]
    if not falling(levels):
        said = ", ".join(f"{level:g}" for level in levels)
        raise ValueError(
            f"the scheduler in {model} gives {counted(steps, 'step')} the levels {said}, which do "
            "not fall from 1 at most to 0: take another sampler.steps, or mend its shift"
        )


def save_merged(
    pipeline: type[DiffusionPipeline],
    model: Pipeline,
    student: LoraWeights | FullWeights,
    scheduler: CPSFlowMatchScheduler,
    dtypes: Mapping[str, torch.dtype],
    out: Path,
) -> float:
    """The pipeline in `model` with the student's weights in its own, and the few-step scheduler.

    `student` is one LoRA, or a whole transformer's weights. `dtypes` are those of parts by name,
    `default` of all others. The sum is rounded to them, once: of two adapters that are merged one
    after the other in bf16, the second would be rounded away where it is below half of a weight's
    last digit. What both together are below of it is lost; the share that is kept is given back.

    Raises:
        ValueError: if the weights are not this transformer's.
    """
    no_bars()
    words = processors_of(model, silent=False)
    given = {**model.absent, **words}
    pipe: Any = pipeline.from_pretrained(
        str(model), dtype=dict(dtypes), use_safetensors=True, local_files_only=True, **given
    )
    pipe.register_to_config(**{part: tuple(model.index[part]) for part in words})
    if isinstance(student, LoraWeights):
        load_lora(pipe, student.folder, STUDENT)
        kept = _kept(pipe.transformer)
        pipe.fuse_lora(components=["transformer"], adapter_names=[STUDENT], safe_fusing=True)
        pipe.unload_lora_weights()
    else:
        kept = 1.0
        _load_full(pipe.transformer, student.weights, str(model))
    pipe.scheduler = scheduler
    pipe.save_pretrained(out)
    for part in words:  # what it has for pictures, too
        shutil.copytree(model.root / part, out / part, dirs_exist_ok=True)
    for file in out.rglob("*.json"):
        _without_origin(file)
    if model.has(SIDE_FILE):
        shutil.copy(model.root / SIDE_FILE, out / SIDE_FILE)
    return kept


def rounded_away(name: str, kept: float, dtype: str) -> list[str]:
    """The line about a merged pipeline that keeps less than `LEAST_KEPT`."""
    if kept >= LEAST_KEPT:
        return []
    return [
        f"{name} keeps {kept:.0%} of what the adapters change: the rest is too small beside "
        f"weights in {dtype}, and is whole in the LoRA files (--for diffusers, peft, comfyui)"
    ]


def _kept(transformer: nn.Module) -> float:
    """The share of what the LoRA changes in the weights that is left of it in their precision."""
    left = whole = 0.0
    for layer in transformer.modules():
        if STUDENT in getattr(layer, "lora_A", ()):
            weight = layer.get_base_layer().weight.detach()  # type: ignore[operator]
            delta = layer.get_delta_weight(STUDENT).detach()  # type: ignore[operator]
            rounded = (weight + delta.to(weight.dtype)).float() - weight.float()
            left += float((rounded * delta.float()).sum())
            whole += float(delta.float().square().sum())
    return left / whole if whole else 1.0


def _without_origin(file: Path) -> None:
    """Drops the directory that a part was read from: the libraries note it in its settings."""
    text = file.read_text(encoding="utf-8")
    if "_name_or_path" in text:
        kept = {k: v for k, v in json.loads(text).items() if k not in ORIGINS}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load_full(transformer: nn.Module, weights: Mapping[str, Tensor], model: str) -> None:
    """A run's parameters into a transformer; its buffers are its own."""
    here = {name: p.shape for name, p in transformer.named_parameters()}
    odd = sorted(set(here) ^ set(weights)) or [n for n in here if here[n] != weights[n].shape]
    if odd:
        raise ValueError(f"the run's weights are not those of the transformer in {model}: {odd[0]}")
    transformer.load_state_dict(dict(weights), strict=False)


def load_lora(pipe: Any, folder: Path, name: str) -> None:
    """A LoRA folder through the pipeline's own loader, as the adapter `name`; the transformer is
    in eval mode afterwards.

    Raises:
        ValueError: if the folder holds no single LoRA file, one of another model or with weights
            for a text encoder, or one with a weight that is not finite.
    """
    file = lora_file(folder)
    check_lora_file(file)
    try:
        with _quiet():
            # Named, and safetensors only: by itself the loader would turn to a pickle.
            pipe.load_lora_weights(
                str(folder), weight_name=file.name, use_safetensors=True, adapter_name=name
            )
            # The file's header may name a dropout, and new layers are in training mode.
            pipe.transformer.eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a file can make of diffusers and peft
        raise ValueError(
            f"the LoRA in {folder} does not fit this model: {first_sentence(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own lines about a LoRA that does not fit, which the error says once,
    and about a second adapter beside a first, which is what is meant."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        diffusers_logging.set_verbosity(before)


def lora_metadata(settings: AdapterSettings) -> dict[str, Any]:
    """The LoRA's config in plain JSON types."""
    plain = {}
    for key, value in settings.config().to_dict().items():
        plain[key] = sorted(value) if isinstance(value, set) else value
    return plain
