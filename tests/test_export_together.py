"""The two adapters of an export side by side in other programs, and merged into their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from peft import PeftModel
from program_readers import (
    NAMES,
    STRENGTHS,
    by_comfyui,
    by_kohya,
    every_reader,
    in_diffusers,
    same_product,
    trained,
)
from safetensors.torch import load_file
from students import Student, student
from test_export_strength import Deltas, layer_deltas

from tiltflow.models.adapters import AdapterSettings

Tiny = Callable[[str], Path]
FORMATS = ("diffusers", "comfyui", "peft", "kohya", "merged")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest, tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Student:
    out = tmp_path_factory.mktemp(request.param)
    return student(tiny_pipeline, request.param, out, formats=FORMATS, strengths=STRENGTHS)


def test_other_programs_read_both_adapters_side_by_side(made: Student) -> None:
    """Each file loaded by itself, the tilt at half its strength."""
    strengths = {"few_step": 1.0, "tilt": 0.5}
    originals = load_file(made.export / "original" / "transformer_0.5.safetensors")
    expected = trained(made, "baked_0.5")
    modules = [k.removesuffix(".weight") for k in originals if k.endswith(".weight")]

    def summed(read: Callable[[str], Deltas]) -> Deltas:
        total: Deltas = {}
        for name, strength in strengths.items():
            for weight, delta in read(name).items():
                total[weight] = total.get(weight, 0) + strength * delta
        return in_diffusers(made, originals, total)

    def comfyui(name: str) -> Deltas:
        return by_comfyui(made.export / "comfyui" / f"{name}.safetensors")

    def kohya(name: str) -> Deltas:
        return by_kohya(made.export / "kohya" / f"{name}.safetensors", modules)

    pipe: Any = DiffusionPipeline.from_pretrained(made.base)
    for name in strengths:
        pipe.load_lora_weights(made.export / name, adapter_name=name)
    pipe.set_adapters(list(strengths), list(strengths.values()))
    network = DiffusionPipeline.from_pretrained(made.base).transformer
    peft = made.export / "peft"
    wrapped = PeftModel.from_pretrained(network, str(peft / "few_step"), adapter_name="few_step")
    wrapped.load_adapter(str(peft / "tilt"), adapter_name="tilt")
    wrapped.base_model.set_adapter(list(strengths))
    for layer in wrapped.modules():
        if hasattr(layer, "get_delta_weight"):
            layer.scale_layer(1.0)
            layer.set_scale("tilt", strengths["tilt"])
    readers = {
        "comfyui": summed(comfyui),
        "kohya": summed(kohya),
        "diffusers": layer_deltas(pipe.transformer, *strengths),
        "peft": layer_deltas(wrapped.base_model.model, *strengths),
    }
    for reader, found in readers.items():
        same_product(reader, found, expected)


def test_merged_pipelines_are_their_base_and_the_product(made: Student) -> None:
    """At every strength; sums are rounded to fp32, and the product is by diffusers' names."""
    for strength in STRENGTHS:
        folder = f"merged_{strength:g}"
        same_product(folder, changed(made, folder), trained(made, f"baked_{strength:g}"))


@pytest.mark.parametrize("name", ["sd35m", "flux1_dev"])
def test_adapters_of_other_ranks_scales_and_modules(
    tiny_pipeline: Tiny, tmp_path: Path, name: str
) -> None:
    """Some modules have the one adapter alone, some both, and of what the makers stack a part."""
    odd = (
        AdapterSettings(3, 5.0, ["attn.to_q", "attn.to_v", "attn.to_out.0"]),
        AdapterSettings(2, 7.0, ["attn.to_k", "attn.to_v", "attn.add_v_proj", "ff.net.2"]),
    )
    options = {"formats": FORMATS, "strengths": (0.3,), "settings": odd}
    made = student(tiny_pipeline, name, tmp_path, **options)
    originals = load_file(made.export / "original" / "transformer.safetensors")
    for file in ("few_step", "tilt", "baked_0.3"):
        for reader, found in every_reader(made, originals, file).items():
            same_product(f"{file} by {reader}", found, trained(made, file))
    same_product("merged", changed(made, "merged"), trained(made, "baked_0.3"))


def changed(made: Student, folder: str) -> Deltas:
    """What a merged pipeline's transformer has besides its base, by module."""
    base = DiffusionPipeline.from_pretrained(made.base).transformer.state_dict()
    state = DiffusionPipeline.from_pretrained(made.export / folder).transformer.state_dict()
    assert state.keys() == base.keys()
    found = {k: value.double() - base[k].double() for k, value in state.items()}
    return {k.removesuffix(".weight"): delta for k, delta in found.items() if delta.abs().max() > 0}
