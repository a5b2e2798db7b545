"""An export's LoRAs in other programs' formats, and the merged transformer as one file.

- ComfyUI, `comfyui/NAME.safetensors`: `diffusion_model.ORIGINAL.lora_A.weight`; `.alpha` / rank.
- kohya, `kohya/NAME.safetensors`: `lora_unet_ORIGINAL.lora_down.weight`; `.alpha` / rank.
- PEFT, `peft/NAME/`: `base_model.model.MODULE.lora_A.weight`; `lora_alpha` / `r`.

ORIGINAL are the makers' names (`keys/`). Every file has α = rank, so that a reader that knows no α
takes the same product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltflow.formats.contract import CONTRACT_KEY, Contract
from tiltflow.formats.keys import Layout, Pair, in_block, original_lora, original_state
from tiltflow.formats.loras import Lora
from tiltflow.formats.wanted import FileType
from tiltflow.formats.writing import lora_metadata
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.meta import pipeline_configs
from tiltflow.models.pipelines.storage import FP8, lost_in_fp8, taken
from tiltflow.models.pipelines.weights import largest, meta_model

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each module's weight, by the module's name."""


def shapes_of(base: Pipeline) -> Shapes:
    """Those of a pipeline's transformer, by its configuration."""
    network = meta_model(pipeline_configs(base)["transformer"])
    return {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def check_fit(lora: Lora, shapes: Shapes) -> None:
    """Whether a LoRA is one of the network of these shapes: no program that loads it would say so
    before, and some leave out what does not fit.

    Raises:
        ValueError: naming the first module that is not there, of another shape, or of another rank
            than the LoRA says, by which its scale is.
    """
    for name, down in lora.weights.items():
        module, is_down, _ = name.partition(".lora_A.weight")
        if not is_down:
            continue
        here, up = shapes.get(module), lora.weights[f"{module}.lora_B.weight"]
        if here is None or (up.shape[0], *down.shape[1:]) != here:
            there = "has none there" if here is None else f"has {'×'.join(map(str, here))}"
            raise ValueError(
                f"the checkpoint's {lora.name} is of another model: on {module} it is for "
                f"{'×'.join(map(str, (up.shape[0], *down.shape[1:])))}, and the base {there}"
            )
        if not len(down) == up.shape[1] == lora.settings.rank:
            raise ValueError(
                f"the checkpoint's {lora.name} says that its rank is {lora.settings.rank}, but on "
                f"{module} it is {len(down)}: its state.json is another's"
            )


def write_comfyui(lora: Lora, layout: Layout, rows: Mapping[str, int], folder: Path) -> Path:
    """A LoRA in native names. ComfyUI's scale is `.alpha` / rank, and 1 without `.alpha`."""
    tensors: dict[str, Tensor] = {}
    for module, pair in original_lora(lora.weights, layout, rows).items():
        key = f"diffusion_model.{module}"
        tensors |= {f"{key}.lora_A.weight": pair.a, f"{key}.lora_B.weight": pair.b}
        tensors[f"{key}.alpha"] = _alpha(pair)
    return _save(tensors, folder / f"{lora.name}.safetensors", lora.contract)


def write_kohya(lora: Lora, layout: Layout, rows: Mapping[str, int], folder: Path) -> Path:
    """A LoRA as kohya's sd-scripts name them: the module's path with `_` for each dot."""
    tensors: dict[str, Tensor] = {}
    for module, pair in original_lora(lora.weights, layout, rows).items():
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": pair.a, f"{key}.lora_up.weight": pair.b}
        tensors[f"{key}.alpha"] = _alpha(pair)
    more = {"ss_network_module": "networks.lora", "ss_network_dim": str(lora.settings.rank)}
    return _save(tensors, folder / f"{lora.name}.safetensors", lora.contract, more)


def write_peft(lora: Lora, folder: Path) -> Path:
    """A folder that `peft.PeftModel.from_pretrained(transformer, folder)` reads."""
    place = folder / lora.name
    _save(
        {f"base_model.model.{name}": w for name, w in lora.weights.items()},
        place / PEFT_WEIGHTS,
        lora.contract,
    )
    base = lora.contract.base
    config: dict[str, Any] = lora_metadata(lora.settings) | {
        "base_model_name_or_path": base.hub_id or base.name,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (place / PEFT_CONFIG).write_text(text, encoding="utf-8")
    return place


def write_original(
    transformer: Path, layout: Layout, dtype: FileType | None, file: Path, contract: Contract
) -> list[str]:
    """A pipeline's transformer (its folder) as one file in the original layout; a line where that
    is another model.

    In fp8 (1 + 4 + 3 bits, without scales) are the matrices of the blocks; the rest is in bf16.

    Raises:
        ValueError: if a tensor has no original name, or a value is beyond what 8 bits hold.
    """
    state: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    pipeline = Pipeline(transformer.parent)
    for name in pipeline.weight_files(transformer.name):
        state |= load_file(transformer / name)
    if dtype is not None:
        for name in list(state):
            eight = dtype == "fp8" and _matrix(name, state[name]) and in_block(name)
            lost |= lost_in_fp8({name: state[name]}) if eight else {}
            state[name] = _rounded(name, state[name], FP8 if eight else torch.bfloat16)
    kind = next(iter(state.values())).dtype if dtype is None else torch.bfloat16
    dropped = layout.dropped(pipeline.config(transformer.name))
    made = {name: torch.zeros(shape, dtype=kind) for name, shape in dropped.items()}
    _save(made | original_state(state, layout), file, contract)
    return [f"{file.name} in fp8 {what}: take --dtype bf16" for what in taken(lost)]


def _matrix(name: str, value: Tensor) -> bool:
    """Whether a tensor is a linear layer's matrix, and not a table of SANA's modulation."""
    return name.endswith(".weight") and value.ndim == 2


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    if largest(value) > most:
        raise ValueError(
            f"the merged transformer has a value of {largest(value):g} in {name}, and "
            f"{dtype} reaches to {most:g}: take --dtype bf16"
        )
    return value.to(dtype)


def _alpha(pair: Pair) -> Tensor:
    return torch.tensor(float(len(pair.a)))


def _save(
    tensors: Mapping[str, Tensor],
    file: Path,
    contract: Contract,
    more: Mapping[str, str] | None = None,
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", CONTRACT_KEY: contract.text(), **(more or {})}
    kept = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
    save_file(kept, file, header)
    return file
