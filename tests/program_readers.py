"""Readers of exported files, written from other programs' rules: ΔW of each of them.

The readers are ours, after the rules that these programs' documents and users state; the programs
themselves were not run. ComfyUI: a LoRA of the weight `diffusion_model.X.weight` has up =
`.lora_B.weight`, down = `.lora_A.weight`, and adds up @ down times `.alpha` / down's rows, or times
1 without `.alpha`. kohya's sd-scripts: the module's path with `_` for each dot behind `lora_unet_`;
`lora_up` @ `lora_down` times alpha / rows of `lora_down`. PEFT is itself (constraints.txt).
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils as converters
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from peft import PeftModel
from safetensors.torch import load_file
from students import Student
from test_export_strength import Deltas, layer_deltas, products
from torch import Tensor

from tiltflow.formats.contract import read_contract

NAMES = (
    "sd3m", "sd35m", "sd35l", "flux1_dev", "schnell", "flux2_klein_4b", "z_image", "chroma", "sana",
    "qwen_image", "qwen_image_21", "krea2", "flux2_dev", "wan21_1b",
)  # fmt: skip
STRENGTHS = (0.0, 0.5, 1.0)
TRANSFORMERS = {
    "sd3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "flux2_dev": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "z_image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    "chroma": converters.convert_chroma_transformer_checkpoint_to_diffusers,
    "sana": converters.convert_sana_transformer_to_diffusers,
    # diffusers has the converter of this one as a lambda, which gives what it is given
    "qwen_image": SINGLE_FILE_LOADABLE_CLASSES["QwenImageTransformer2DModel"][
        "checkpoint_mapping_fn"
    ],
    "qwen_image_21": converters.convert_qwen_image21_transformer_checkpoint_to_diffusers,
    "krea2": converters.convert_krea2_transformer_checkpoint_to_diffusers,
    "wan": converters.convert_wan_transformer_to_diffusers,
}
FIXED_WIDTH = ("flux", "chroma")
"""Families whose converter has the published model's width as a constant."""


def trained(made: Student, name: str) -> Deltas:
    """ΔW in fp64 by diffusers' modules, as the run trained it."""
    state, tensors = made.checkpoint.state, made.checkpoint.tensors

    def product(group: str, settings: str) -> Deltas:
        scale = state[settings]["alpha"] / state[settings]["rank"]
        return products(tensors[group], lambda _: scale)

    below, above = product("few_step", "few_step_adapters"), product("ema", "adapters")
    if name in ("few_step", "tilt"):
        return below if name == "few_step" else above
    strength, both = float(name.removeprefix("baked_")), dict(below)
    for module, delta in above.items():
        both[module] = both.get(module, 0) + strength * delta
    return both


def family(made: Student) -> str:
    contract = read_contract(made.export / "few_step")
    assert contract is not None
    return contract.family


def to_diffusers(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An original state dict through diffusers' own converter."""
    convert: Any = TRANSFORMERS[kind]
    if kind in FIXED_WIDTH:
        code, width = convert.__code__, len(state["img_in.weight"])
        consts = tuple(width if c == 3072 else c for c in code.co_consts)
        convert = types.FunctionType(code.replace(co_consts=consts), convert.__globals__)
    return convert(state)


def by_comfyui(file: Path) -> Deltas:
    """ΔW of each original weight."""
    table = load_file(file)
    found = {}
    for key in [k for k in table if k.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        down, up = table.pop(key), table.pop(f"{module}.lora_B.weight")
        alpha = table.pop(f"{module}.alpha", None)
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        assert module.startswith("diffusion_model.")
        name = module.removeprefix("diffusion_model.") + ".weight"
        found[name] = scale * up.double() @ down.double()
    assert not table, "a key that the reader does not know"
    return found


def by_kohya(file: Path, modules: list[str]) -> Deltas:
    """ΔW of each original weight; `modules` are the network's."""
    table, found = load_file(file), {}
    paths = {"lora_unet_" + name.replace(".", "_"): name for name in modules}
    for key in [k for k in table if k.endswith(".lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        down, up = table.pop(key), table.pop(f"{name}.lora_up.weight")
        scale = table.pop(f"{name}.alpha").item() / down.shape[0]
        found[f"{paths[name]}.weight"] = scale * up.double() @ down.double()
    assert not table, "a key that the reader does not know"
    return found


def in_diffusers(made: Student, originals: dict[str, Tensor], deltas: Deltas) -> Deltas:
    """ΔW by diffusers' modules, of ΔW by original weights: each put into zeros of its network and
    sent through diffusers' converter."""
    zeros = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in originals.items()}
    assert set(deltas) <= set(zeros), "a weight that the original network has not"
    for name, delta in deltas.items():
        assert zeros[name].shape == delta.shape
        zeros[name] = delta
    converted = to_diffusers(family(made), zeros)
    return {k.removesuffix(".weight"): v for k, v in converted.items() if v.abs().max() > 0}


def by_peft(made: Student, folder: Path) -> Deltas:
    network = DiffusionPipeline.from_pretrained(made.base).transformer
    wrapped = PeftModel.from_pretrained(network, str(folder), adapter_name="read")
    return layer_deltas(wrapped.base_model.model)


def by_diffusers(made: Student, folder: Path) -> Deltas:
    pipe: Any = DiffusionPipeline.from_pretrained(made.base)
    pipe.load_lora_weights(folder, adapter_name="read")
    return layer_deltas(pipe.transformer)


def same_product(reader: str, found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys(), reader
    for module, delta in expected.items():
        off = (found[module] - delta).norm() / delta.norm()
        assert off <= 1e-6, (reader, module, off)


def every_reader(made: Student, originals: dict[str, Tensor], name: str) -> dict[str, Deltas]:
    """ΔW of one of an export's LoRAs, by diffusers' modules, in every format; `originals` are the
    merged transformer's tensors by their makers' names."""
    modules = [k.removesuffix(".weight") for k in originals if k.endswith(".weight")]
    comfyui = by_comfyui(made.export / "comfyui" / f"{name}.safetensors")
    kohya = by_kohya(made.export / "kohya" / f"{name}.safetensors", modules)
    return {
        "comfyui": in_diffusers(made, originals, comfyui),
        "kohya": in_diffusers(made, originals, kohya),
        "peft": by_peft(made, made.export / "peft" / name),
        "diffusers": by_diffusers(made, made.export / name),
    }
