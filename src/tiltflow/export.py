"""LoRA folders that diffusers loads, read off a run's checkpoint (DESIGN §2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from tiltflow.checkpoint import Checkpoint
from tiltflow.roles import AdapterSettings


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
        raise ValueError("this run trained full copies (adapters.kind=copies): it has no adapters")
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


def _metadata(settings: AdapterSettings) -> dict[str, Any]:
    """The LoRA's config in plain JSON types."""
    plain = {}
    for key, value in settings.config().to_dict().items():
        plain[key] = sorted(value) if isinstance(value, set) else value
    return plain
