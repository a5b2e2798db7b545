"""LoRA folders that diffusers loads, read off a run's checkpoint (DESIGN §2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
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


def read_adapter(folder: Path) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """An exported LoRA folder back as settings and weights by canonical name.

    Raises:
        ValueError: if the folder holds no single LoRA of a transformer with its metadata.
    """
    inner = folder / "export" / "few_step"
    files = sorted((inner if inner.is_dir() else folder).glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{folder} should hold one LoRA file (.safetensors), not {len(files)}")
    with safe_open(files[0], framework="pt") as file:
        raw = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = "transformer."
    if raw is None or not all(key.startswith(prefix) for key in weights):
        raise ValueError(f"{files[0]} is no LoRA of a transformer that tiltflow or diffusers saved")
    facts = {k.removeprefix(prefix): v for k, v in json.loads(raw).items() if k.startswith(prefix)}
    settings = AdapterSettings(facts["r"], facts["lora_alpha"], facts["target_modules"])
    return settings, {key.removeprefix(prefix): value for key, value in weights.items()}


def _metadata(settings: AdapterSettings) -> dict[str, Any]:
    """The LoRA's config in plain JSON types."""
    plain = {}
    for key, value in settings.config().to_dict().items():
        plain[key] = sorted(value) if isinstance(value, set) else value
    return plain
