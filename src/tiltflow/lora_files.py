"""LoRA files read: a stage-1 adapter that a run starts from, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor

from tiltflow.backbones.headers import header_shapes
from tiltflow.roles import AdapterSettings


def adapter_keys(folder: Path) -> set[str] | None:
    """The names of the weights in a LoRA folder as diffusers saves them; None in other formats."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        return None
    with safe_open(files[0], framework="pt") as file:
        keys = set(file.keys())
    prefix = "transformer."
    if not all(key.startswith(prefix) and ".lora_" in key for key in keys):
        return None
    return {key.removeprefix(prefix) for key in keys}


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
