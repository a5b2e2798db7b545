"""What a run leaves for diffusers: LoRA folders, the scheduler, a merged pipeline (DESIGN §2)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tiltflow.backbones.files import SIDE_FILE, TOKEN_PATCH, absent_parts
from tiltflow.checkpoint import Checkpoint
from tiltflow.lora_files import check_lora_file, lora_file
from tiltflow.roles import AdapterSettings
from tiltflow.scheduler import CPSFlowMatchScheduler
from tiltflow.sentences import first_sentence


@dataclass(frozen=True)
class LoraWeights:
    """LoRA folders by adapter name, each with its strength."""

    folders: Mapping[str, tuple[Path, float]]


@dataclass(frozen=True)
class FullWeights:
    """A whole transformer's weights by name."""

    weights: Mapping[str, Tensor]


def export_adapters(
    checkpoint: Checkpoint, pipeline: type[DiffusionPipeline], out: Path
) -> list[Path]:
    """Writes a run's adapters as `out`/few_step and, from stage 2, `out`/tilt.

    `pipeline.load_lora_weights` loads each folder, with its α. The weights are the EMA's.

    Raises:
        ValueError: if the run trained copies, which have no adapters.
    """
    state = checkpoint.state
    if not state.get("adapters"):
        raise ValueError(
            "this run trained full copies (adapters.kind=copies), so it has no adapters: "
            "export it with --merged"
        )
    if state["stage"] == "cold_start":
        folders = {"few_step": (checkpoint.tensors["ema"], state["adapters"])}
    else:
        folders = {
            "few_step": (checkpoint.tensors["few_step"], state["few_step_adapters"]),
            "tilt": (checkpoint.tensors["ema"], state["adapters"]),
        }
    for name, (weights, adapters) in folders.items():
        save_adapter(pipeline, weights, AdapterSettings(**adapters), out / name)
    return [out / name for name in folders]


def save_adapter(
    pipeline: type[DiffusionPipeline],
    weights: Mapping[str, Tensor],
    settings: AdapterSettings,
    directory: Path,
) -> None:
    """One adapter through the pipeline's own `save_lora_weights`, with its metadata (α)."""
    directory.mkdir(parents=True, exist_ok=True)
    pipeline.save_lora_weights(
        str(directory),
        transformer_lora_layers={name: w.detach().cpu() for name, w in weights.items()},
        transformer_lora_adapter_metadata=_metadata(settings),
    )


def few_step_scheduler(model: Path, family: str, eta: float) -> CPSFlowMatchScheduler:
    """The students' scheduler, made from the own scheduler of the pipeline in `model`."""
    config = CPSFlowMatchScheduler.load_config(model, subfolder="scheduler")
    return CPSFlowMatchScheduler.from_config(config, eta=eta, patch=TOKEN_PATCH[family])


def save_merged(
    pipeline: type[DiffusionPipeline],
    model: Path,
    student: LoraWeights | FullWeights,
    scheduler: CPSFlowMatchScheduler,
    dtype: torch.dtype,
    out: Path,
) -> None:
    """The pipeline in `model` with the student's weights in its own, and the few-step scheduler.

    `student` are LoRA folders by name with their strengths, or a whole transformer's weights.
    Sums are rounded to `dtype`, so bf16 is that much less exact than the adapters by themselves.

    Raises:
        ValueError: if the weights are not this transformer's.
    """
    pipe: Any = pipeline.from_pretrained(
        str(model), dtype=dtype, use_safetensors=True, local_files_only=True, **absent_parts(model)
    )
    if isinstance(student, LoraWeights):
        for name, (folder, _) in student.folders.items():
            load_lora(pipe, folder, name)
        names = list(student.folders)
        pipe.set_adapters(names, [strength for _, strength in student.folders.values()])
        pipe.fuse_lora(components=["transformer"], adapter_names=names, safe_fusing=True)
        pipe.unload_lora_weights()
    else:
        _load_full(pipe.transformer, student.weights, model)
    pipe.scheduler = scheduler
    pipe.save_pretrained(out)
    if (model / SIDE_FILE).is_file():
        shutil.copy(model / SIDE_FILE, out / SIDE_FILE)


def _load_full(transformer: nn.Module, weights: Mapping[str, Tensor], model: Path) -> None:
    """A run's parameters into a transformer; its buffers are its own."""
    here = {name: p.shape for name, p in transformer.named_parameters()}
    odd = sorted(set(here) ^ set(weights)) or [n for n in here if here[n] != weights[n].shape]
    if odd:
        raise ValueError(f"the run's weights are not those of the transformer in {model}: {odd[0]}")
    transformer.load_state_dict(dict(weights), strict=False)


def load_lora(pipe: Any, folder: Path, name: str) -> None:
    """A LoRA folder through the pipeline's own loader, as the adapter `name`.

    Raises:
        ValueError: if the folder holds no single LoRA file, or one of another model.
    """
    file = lora_file(folder)
    check_lora_file(file)
    try:
        # Named, and safetensors only: by itself the loader would turn to a pickle in the folder.
        pipe.load_lora_weights(
            str(folder), weight_name=file.name, use_safetensors=True, adapter_name=name
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a file can make of diffusers and peft
        raise ValueError(
            f"the LoRA in {folder} does not fit this model: {first_sentence(error)}"
        ) from error


def _metadata(settings: AdapterSettings) -> dict[str, Any]:
    """The LoRA's config in plain JSON types."""
    plain = {}
    for key, value in settings.config().to_dict().items():
        plain[key] = sorted(value) if isinstance(value, set) else value
    return plain
