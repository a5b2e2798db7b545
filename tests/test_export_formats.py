"""Exports for other programs: their readers, written from their own rules, and diffusers' own
converters give the weights that were trained (`program_readers`)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from program_readers import (
    FIXED_WIDTH,
    NAMES,
    STRENGTHS,
    every_reader,
    family,
    same_product,
    to_diffusers,
    trained,
)
from safetensors.torch import load_file, save_file
from students import Student, random_like, student
from test_export_strength import layer_deltas, products
from tiny_sana import sana
from torch import Tensor

from tiltflow.formats.contract import read_contract
from tiltflow.formats.keys import in_block, layout_of, original_lora, original_state
from tiltflow.formats.loras import both
from tiltflow.formats.programs import write_original
from tiltflow.models.roles import AdapterSettings

Tiny = Callable[[str], Path]
FILES = ("few_step", "tilt", "baked_0", "baked_0.5", "baked_1")


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest, tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Student:
    return student(
        tiny_pipeline,
        request.param,
        tmp_path_factory.mktemp(request.param),
        formats=("diffusers", "comfyui", "peft", "kohya"),
        strengths=STRENGTHS,
    )


@pytest.fixture(scope="module")
def merged(
    made: Student, tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Student, dict[str, Tensor]]:
    """The same student exported as one file, and its tensors."""
    name = next(n for n in NAMES if n in made.model.parent.name)
    out = tmp_path_factory.mktemp(f"merged_{name}")
    again = student(tiny_pipeline, name, out, formats=("merged",), strengths=(0.5,))
    return again, load_file(again.export / "original" / "transformer.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_other_programs_read_the_trained_product(
    made: Student, merged: tuple[Student, dict[str, Tensor]], name: str
) -> None:
    for reader, found in every_reader(made, merged[1], name).items():
        same_product(reader, found, trained(made, name))


@pytest.mark.parametrize("program", ["comfyui", "kohya"])
def test_diffusers_reads_qwen_images_files_of_other_programs(
    tiny_pipeline: Tiny, tmp_path: Path, program: str
) -> None:
    """Its loader knows both names of this family, and their `.alpha`."""
    made = student(tiny_pipeline, "qwen_image", tmp_path, formats=(program,), strengths=(0.5,))
    for name in ("few_step", "baked_0.5"):
        pipe: Any = DiffusionPipeline.from_pretrained(made.base)
        pipe.load_lora_weights(
            made.export / program, weight_name=f"{name}.safetensors", adapter_name="read"
        )
        expected, found = trained(made, name), layer_deltas(pipe.transformer)
        assert found.keys() == expected.keys()
        for module, delta in expected.items():
            assert (found[module] - delta).norm() <= 1e-6 * delta.norm(), module


def test_the_norms_of_a_larger_sana_have_names_too() -> None:
    """Those that diffusers' script has and its converter of single files leaves out."""
    state = sana(wide=True).transformer.state_dict()
    expected = {name: value.clone() for name, value in state.items()}
    made = original_state(state, layout_of("sana"))
    for ours, theirs in (("attn1", "attn"), ("attn2", "cross_attn")):
        for one in "qk":
            value = expected[f"transformer_blocks.1.{ours}.norm_{one}.weight"]
            assert torch.equal(made[f"blocks.1.{theirs}.{one}_norm.weight"], value)


def test_the_one_file_loads_back_through_diffusers_converter(
    merged: tuple[Student, dict[str, Tensor]],
) -> None:
    """Difference 0 to the merged pipeline, and every tensor of it."""
    made, originals = merged
    expected = DiffusionPipeline.from_pretrained(made.export / "merged").transformer.state_dict()
    found = to_diffusers(family_of(made.export / "merged"), dict(originals))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_from_single_file(merged: tuple[Student, dict[str, Tensor]]) -> None:
    """diffusers finds out what the file is by its names, and loads it."""
    made, _ = merged
    kind = family_of(made.export / "merged")
    if kind in FIXED_WIDTH:
        pytest.skip("diffusers' converter takes the published width alone")
    expected = DiffusionPipeline.from_pretrained(made.export / "merged").transformer
    file = made.export / "original" / "transformer.safetensors"
    found = type(expected).from_single_file(
        str(file), config=str(made.export / "merged"), subfolder="transformer"
    )
    here = found.state_dict()
    assert all(torch.equal(here[name], value) for name, value in expected.state_dict().items())


def family_of(folder: Path) -> str:
    contract = read_contract(folder)
    assert contract is not None
    return contract.family


def test_in_8_bits(made: Student, tmp_path: Path) -> None:
    """Matrices of blocks are within e4m3's rounding, the rest is in bf16 as it was."""
    layout = layout_of(family(made))
    exact = load_file(write(made, None, tmp_path / "a.safetensors"))
    eight = load_file(write(made, "fp8", tmp_path / "b.safetensors"))
    kinds = {w.dtype for w in eight.values()}
    assert kinds == {torch.float8_e4m3fn, torch.bfloat16} and exact.keys() == eight.keys()
    for name, value in eight.items():
        if value.dtype == torch.float8_e4m3fn:
            error = (value.float() - exact[name]).abs()
            assert (error <= exact[name].abs() / 16 + 2**-10).all() and error.max() > 0
            assert re.match(r"\w*(blocks|layers|refiner)\.\d+\.", name) and value.ndim == 2
            assert name.endswith(".weight")
        else:
            assert torch.equal(value, exact[name].bfloat16())
    assert layout.source


def write(made: Student, dtype: Any, file: Path) -> Path:
    contract = read_contract(made.export / "few_step")
    assert contract is not None
    layout = layout_of(contract.family)
    assert write_original(made.base / "transformer", layout, dtype, file, contract) == []
    return file


def test_values_too_small_for_8_bits_are_told(made: Student, tmp_path: Path) -> None:
    folder, name = tmp_path / "base" / "transformer", matrix_of_a_block(made)
    shutil.copytree(made.base, folder.parent)
    state = DiffusionPipeline.from_pretrained(made.base).transformer.state_dict()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state[name] = state[name] / state[name].abs().max() / 512
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    contract = read_contract(made.export / "few_step")
    assert contract is not None
    layout, out = layout_of(contract.family), tmp_path / "out.safetensors"
    (line,) = write_original(folder, layout, "fp8", out, contract)
    assert re.fullmatch(
        rf"out\.safetensors in fp8 takes \d\d% of {name}, .* 8 bits: take --dtype bf16", line
    )
    assert write_original(folder, layout, "bf16", out, contract) == []


def matrix_of_a_block(made: Student) -> str:
    """The name of one that goes to 8 bits."""
    state = DiffusionPipeline.from_pretrained(made.base).transformer.state_dict()
    end = re.compile(r".*\.(attn1?|attention)\.to_q\.weight")
    return next(name for name in state if in_block(name) and end.fullmatch(name))


def test_a_value_beyond_8_bits_is_refused(made: Student, tmp_path: Path) -> None:
    folder, name = tmp_path / "transformer", matrix_of_a_block(made)
    folder.mkdir()
    state = DiffusionPipeline.from_pretrained(made.base).transformer.state_dict()
    state[name] = state[name].clone()
    state[name][0, 0] = 449.0
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    contract = read_contract(made.export / "few_step")
    assert contract is not None
    with pytest.raises(ValueError, match=f"a value of 449 in {name}, and .* take --dtype bf16"):
        out = tmp_path / "out.safetensors"
        write_original(folder, layout_of(contract.family), "fp8", out, contract)


def test_parts_of_what_the_original_stacks() -> None:
    """A LoRA of q and v alone, of two ranks: k's rows are zero, and so are FLUX.1's of the MLP."""
    rows = {"to_q": 4, "to_k": 4, "to_v": 4}
    block = "single_transformer_blocks.3."
    sizes = {f"{block}attn.{name}": size for name, size in rows.items()} | {f"{block}proj_mlp": 8}
    shapes = {}
    for name, rank in (("to_v", 2), ("to_q", 3)):
        shapes[f"{block}attn.{name}.lora_A.weight"] = torch.empty(rank, 5)
        shapes[f"{block}attn.{name}.lora_B.weight"] = torch.empty(4, rank)
    weights = random_like(shapes, 0)
    ((name, pair),) = original_lora(weights, layout_of("flux"), sizes).items()
    assert name == "single_blocks.3.linear1" and pair.a.shape == (5, 5)
    q, k, v, mlp = (pair.b @ pair.a).split([4, 4, 4, 8])
    expected = products(weights, lambda _: 1.0)
    assert torch.allclose(q.double(), expected[f"{block}attn.to_q"], atol=1e-6)
    assert torch.allclose(v.double(), expected[f"{block}attn.to_v"], atol=1e-6)
    assert not k.any() and not mlp.any()


def test_halves_that_stand_the_other_way_round() -> None:
    """The last block's text norm in SD3 alone, and the last norm of all."""
    rows = {f"transformer_blocks.{i}.norm1_context.linear": 4 for i in range(2)} | {
        "norm_out.linear": 4
    }
    shapes = {}
    for name in rows:
        shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = (
            torch.empty(2, 3), torch.empty(4, 2),
        )  # fmt: skip
    weights = random_like(shapes, 0)
    made = original_lora(weights, layout_of("sd3"), rows)
    for name, original, exchanged in (
        ("transformer_blocks.0.norm1_context.linear", "joint_blocks.0.context_block", False),
        ("transformer_blocks.1.norm1_context.linear", "joint_blocks.1.context_block", True),
        ("norm_out.linear", "final_layer", True),
    ):
        up = weights[f"{name}.lora_B.weight"]
        expected = up.roll(2, dims=0) if exchanged else up
        assert torch.equal(made[f"{original}.adaLN_modulation.1"].b, expected)


def test_adapters_of_other_ranks_and_modules_in_one() -> None:
    first = AdapterSettings(2, 2, ["a", "b"]), {"a": 2, "b": 2}
    second = AdapterSettings(3, 3, ["b", "c"]), {"b": 3, "c": 3}
    adapters = []
    for seed, (settings, ranks) in enumerate((first, second)):
        shapes = {}
        for name, rank in ranks.items():
            shapes[f"{name}.lora_A.weight"] = torch.empty(rank, 5)
            shapes[f"{name}.lora_B.weight"] = torch.empty(4, rank)
        adapters.append((random_like(shapes, seed), settings))
    weights, settings = both(*adapters, 0.25)
    assert (settings.rank, settings.alpha, settings.targets) == (5, 5, "a|b|c")
    one, two = (products(w, lambda _: 1.0) for w, _ in adapters)
    found = products(weights, lambda _: 1.0)
    assert torch.allclose(found["a"], one["a"]) and torch.allclose(found["c"], 0.25 * two["c"])
    assert torch.allclose(found["b"], one["b"] + 0.25 * two["b"])
    assert both(*adapters, 0.0) == adapters[0]


def test_what_has_no_original_name() -> None:
    layout = layout_of("sd3")
    weights = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="x has no name in the original layout"):
        original_lora(weights, layout, {"x": 2})
    with pytest.raises(ValueError, match="has transformer_blocks.0.attn.to_q.bias, but no .*to_k"):
        original_state({"transformer_blocks.0.attn.to_q.bias": torch.ones(2)}, layout)
    with pytest.raises(ValueError, match="no map to the original names of family mixture"):
        layout_of("mixture")
