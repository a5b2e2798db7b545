"""An exported LoRA acts alike in every reader: three of them, written from their own rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import RESOLUTION, Student, random_like, student
from torch import Tensor

from tiltflow.formats.writing import baked, save_adapter
from tiltflow.models.adapters import AdapterSettings
from tiltflow.models.families import load_backbone
from tiltflow.models.lora_files import read_adapter
from tiltflow.models.roles import adapter_roles

Tiny = Callable[[str], Path]
Deltas = dict[str, Tensor]
NAMES = ("sd3m", "flux1_dev", "flux2_klein_4b")
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest, tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Student:
    return student(tiny_pipeline, request.param, tmp_path_factory.mktemp(request.param))


def trained(made: Student, name: str) -> Deltas:
    """ΔW = α / r · B A in fp64, as the run trained it."""
    group = "few_step" if name == "few_step" else "ema"
    weights = made.checkpoint.tensors[group]
    facts = made.checkpoint.state["adapters"]
    assert facts["alpha"] / facts["rank"] == 2  # what a reader that knows no α would halve
    return products(weights, lambda module: facts["alpha"] / facts["rank"])


def products(weights: dict[str, Tensor], scale: Callable[[str], float]) -> Deltas:
    found = {}
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            up = weights[f"{module}.lora_B.weight"]
            found[module] = scale(module) * up.double() @ down.double()
    return found


def by_alpha_tensor(file: Path) -> Deltas:
    """Scale = `.alpha` / rank, and 1 where there is no such tensor (ComfyUI's rule, for one)."""
    weights = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}

    def scale(module: str) -> float:
        alpha = weights.get(f"{module}.alpha")
        return 1.0 if alpha is None else float(alpha) / len(weights[f"{module}.lora_A.weight"])

    return products(weights, scale)


def by_diffusers(base: Path, folder: Path) -> Deltas:
    pipe: Any = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(folder, adapter_name="read")
    return layer_deltas(pipe.transformer)


def by_peft(base: Path, file: Path) -> Deltas:
    """A `LoraConfig` of the header's metadata, and the weights by their names."""
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()[LORA_ADAPTER_METADATA_KEY])
    facts = {k.removeprefix("transformer."): v for k, v in said.items()}
    network = DiffusionPipeline.from_pretrained(base).transformer
    inject_adapter_in_model(LoraConfig(**facts), network, adapter_name="read")
    weights = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    set_peft_model_state_dict(network, weights, adapter_name="read")
    assert len(get_peft_model_state_dict(network, adapter_name="read")) == len(weights)
    return layer_deltas(network)


def layer_deltas(network: Any, *adapters: str) -> Deltas:
    """ΔW by module, summed over the adapters (by default the one that is called `read`)."""
    return {
        name: sum(layer.get_delta_weight(one).double() for one in adapters or ("read",))
        for name, layer in network.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("name", ["few_step", "tilt"])
def test_three_readers_have_the_trained_product(made: Student, name: str) -> None:
    expected, file = trained(made, name), made.export / name / LORA
    readers = {
        "alpha tensor": by_alpha_tensor(file),
        "diffusers": by_diffusers(made.base, made.export / name),
        "peft": by_peft(made.base, file),
    }
    for reader, found in readers.items():
        assert found.keys() == expected.keys(), reader
        for module, delta in expected.items():
            off = (found[module] - delta).norm() / delta.norm()
            assert off <= 1e-6, (reader, module, off)


def test_read_back_as_a_start_of_stage_2(made: Student) -> None:
    settings, weights = read_adapter(made.export / "few_step")
    facts = made.checkpoint.state["few_step_adapters"]
    assert (settings.rank, settings.alpha) == (facts["rank"], facts["rank"])
    delta = products(weights, lambda module: settings.alpha / settings.rank)
    for module, expected in trained(made, "few_step").items():
        assert torch.allclose(delta[module], expected, rtol=1e-6, atol=0)


def test_stage_2_on_the_export_is_stage_2_on_the_run(made: Student) -> None:
    """The same velocities and gradients from both, to rounding."""
    facts = AdapterSettings(**made.checkpoint.state["few_step_adapters"])
    starts = [
        (facts, made.checkpoint.tensors["few_step"]),
        read_adapter(made.export / "few_step"),
    ]
    seen = []
    for below in starts:
        backbone: Any = load_backbone(
            made.model, generator_path=made.generator, device="cpu", resolution=RESOLUTION
        )
        roles = adapter_roles(backbone, facts, seed=1, few_step=below)
        roles.generator.load(random_like(roles.generator.state(), 5))
        x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
        cond, sigma = backbone.encode(["a cat", "a dog"]), torch.tensor([0.9, 0.5])
        v = roles.generator(x, sigma, cond)
        v.square().sum().backward()
        assert roles.reference is not None
        gradients = [p.grad for p in roles.generator.parameters.values()]
        seen.append([v.detach(), roles.reference(x, sigma, cond).detach(), *gradients])
    for one, other in zip(*seen, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
    assert seen[0][0].std() > 1e-3


def test_a_fake_score_on_an_export_has_the_recipes_own_scale(made: Student) -> None:
    """An export holds no fake score and has α = rank: a fresh one does not take that over."""
    backbone: Any = load_backbone(
        made.model, generator_path=made.generator, device="cpu", resolution=RESOLUTION
    )
    facts = AdapterSettings(**made.checkpoint.state["adapters"])
    below = read_adapter(made.export / "few_step")
    roles = adapter_roles(backbone, facts, seed=1, few_step=below)
    scales = {
        name: scale
        for layer in roles.fake_score.network.modules()
        if hasattr(layer, "lora_A")
        for name, scale in layer.scaling.items()
    }
    assert scales["fake_score"] == facts.alpha / facts.rank == 2
    assert below[0].alpha == below[0].rank


def test_only_b_is_scaled_and_the_run_keeps_its_own() -> None:
    weights = {"m.lora_A.weight": torch.ones(2, 3), "m.lora_B.weight": torch.ones(4, 2)}
    made, settings = baked(weights, AdapterSettings(2, 3.0, ["m"]))
    assert settings == AdapterSettings(2, 2, ["m"])
    assert torch.equal(made["m.lora_A.weight"], weights["m.lora_A.weight"])
    assert torch.equal(made["m.lora_B.weight"], torch.full((4, 2), 1.5))
    assert torch.equal(weights["m.lora_B.weight"], torch.ones(4, 2))
    again, same = baked(made, settings)
    assert same == settings and torch.equal(again["m.lora_B.weight"], made["m.lora_B.weight"])


def test_why_there_are_no_alpha_tensors(made: Student, tmp_path: Path) -> None:
    """diffusers refuses them beside its metadata, in all three families: if it ever takes them,
    this is the place to think again."""
    file = made.export / "few_step" / LORA
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    weights = load_file(file)
    modules = {name.rsplit(".lora_", 1)[0] for name in weights}
    alphas = {f"{module}.alpha": torch.tensor(2.0) for module in modules}
    save_file(weights | alphas, tmp_path / LORA, header)
    pipe: Any = DiffusionPipeline.from_pretrained(made.base)
    with pytest.raises(ValueError):
        pipe.load_lora_weights(tmp_path)


def test_any_ratio(made: Student, tmp_path: Path) -> None:
    """α / r = 5/3, which is no power of two and rounds."""
    facts = replace(AdapterSettings(**made.checkpoint.state["adapters"]), alpha=10 / 3)
    weights = made.checkpoint.tensors["ema"]
    pipeline = type(load_backbone(made.base, device="cpu").pipe)  # type: ignore[attr-defined]
    save_adapter(pipeline, weights, facts, tmp_path)
    expected = products(weights, lambda module: 5 / 3)
    for module, delta in by_alpha_tensor(tmp_path / LORA).items():
        assert (delta - expected[module]).norm() <= 1e-6 * expected[module].norm()
