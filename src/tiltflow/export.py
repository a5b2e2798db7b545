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

from tiltflow.backbones.headers import header_shapes
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
    file = lora_file(inner if inner.is_dir() else folder)
    with safe_open(file, framework="pt") as opened:
        raw = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    prefix = "transformer."
    try:
        if not all(key.startswith(prefix) for key in weights):
            raise ValueError("a weight of something else")
        saved = json.loads(raw or "").items()
        facts = {k.removeprefix(prefix): v for k, v in saved if k.startswith(prefix)}
        settings = AdapterSettings(facts["r"], facts["lora_alpha"], facts["target_modules"])
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} is no LoRA of a transformer that tiltflow or diffusers saved"
        ) from error
    return settings, {key.removeprefix(prefix): value for key, value in weights.items()}


def lora_file(folder: Path) -> Path:
    """The one LoRA file in a folder, after a look at its header.

    Raises:
        ValueError: if there is none, there are several, or it is torn or no safetensors file.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no LoRA folder {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no LoRA (no .safetensors file)")
    if len(files) > 1:
        raise ValueError(f"{folder} should hold one LoRA file (.safetensors), not {len(files)}")
    header_shapes(files[0])
    return files[0]


def _metadata(settings: AdapterSettings) -> dict[str, Any]:
    """The LoRA's config in plain JSON types."""
    plain = {}
    for key, value in settings.config().to_dict().items():
        plain[key] = sorted(value) if isinstance(value, set) else value
    return plain
