"""Which weights a pipeline or an adapter holds, told by their content alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tiltflow.models.pipelines import fingerprint
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.files import check_pipeline, unread_shards
from tiltflow.models.pipelines.fingerprint import (
    adapter_fingerprint,
    encoders_fingerprint,
    pipeline_fingerprint,
)
from tiltflow.models.pipelines.loading import load_part
from tiltflow.models.pipelines.weights import check_weights
from tiltflow.tasks.choices import files_dtype

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "copy")


def change(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def test_a_copy_is_the_same_and_text_encoders_do_not_count(
    tiny_pipeline: Callable[[str], Path], copy: Path
) -> None:
    own = pipeline_fingerprint(tiny_pipeline("sd3m"))
    assert len(own) == 64 and own != pipeline_fingerprint(tiny_pipeline("sd35m"))
    shutil.rmtree(copy / "text_encoder")
    change(copy / "vae" / "config.json", "_diffusers_version", "9.9")
    assert pipeline_fingerprint(copy) == own


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_the_weights_of_the_same_shapes_are_others(copy: Path, part: str) -> None:
    before = pipeline_fingerprint(copy)
    file = copy / part / WEIGHTS
    save_file({name: w * 1.5 for name, w in load_file(file).items()}, file)
    assert pipeline_fingerprint(copy) != before


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("scheduler/scheduler_config.json", "shift"),
        ("vae/config.json", "scaling_factor"),
        ("transformer/config.json", "patch_size"),
        ("model_index.json", "_class_name"),
    ],
)
def test_the_settings_count(copy: Path, file: str, key: str) -> None:
    before = pipeline_fingerprint(copy)
    change(copy / file, key, 7)
    assert pipeline_fingerprint(copy) != before


def test_a_large_file_counts_by_size_header_and_blocks(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 16)
    before = pipeline_fingerprint(copy)
    file = copy / "transformer" / WEIGHTS
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (0, header - 1, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert pipeline_fingerprint(copy) != before
    file.write_bytes(content + b"\0")
    assert pipeline_fingerprint(copy) != before
    file.write_bytes(content)
    assert pipeline_fingerprint(copy) == before


PARTS = {
    "transformer": diffusers.SD3Transformer2DModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModelWithProjection,
    "text_encoder_3": transformers.T5EncoderModel,
}


def saved_over(pipeline: Path, part: str) -> str:
    """A fine-tune of a part, in bf16 and in shards, saved over what is there, which stays; the name
    of a weight whose values are others than before."""
    network = PARTS[part].from_pretrained(pipeline / part)
    name = next(key for key, value in network.named_parameters() if value.ndim > 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    network.bfloat16().save_pretrained(pipeline / part, max_shard_size="20KB")
    return name


def read(pipeline: Pipeline, part: str) -> dict[str, torch.Tensor]:
    """The tensors of the files that are told apart, counted and checked."""
    found: dict[str, torch.Tensor] = {}
    for name in pipeline.weight_files(part):
        found |= load_file(pipeline.root / part / name)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_of_an_old_file_and_new_shards_that_counts_which_the_library_loads(
    copy: Path, part: str
) -> None:
    """diffusers loads the shards, transformers the single file."""
    before = pipeline_fingerprint(copy)
    name, own = saved_over(copy, part), Pipeline(copy)
    assert own.both_kinds(part)
    said = [f"{copy}/{part} has model.safetensors and shards"] if "encoder" in part else []
    assert [line.partition(":")[0] for line in unread_shards(own)] == said
    check_pipeline(copy)
    check_weights(copy)
    loaded = load_part(own, part, torch.float32).state_dict()[name]
    assert torch.equal(read(own, part)[name].float(), loaded)
    assert (len(own.weight_files(part)) > 1) is (part in ("transformer", "vae"))
    assert (pipeline_fingerprint(copy) != before) is (part in ("transformer", "vae"))
    assert files_dtype(own) == ("bf16" if part == "transformer" else "fp32")
    both = pipeline_fingerprint(copy), encoders_fingerprint(own)
    for file in {*copy.glob(f"{part}/*.safetensors*")} - {*copy.glob(f"{part}/*.index.json")}:
        if file.name not in own.weight_files(part):
            file.unlink()
    if len(own.weight_files(part)) == 1:
        (copy / part / "model.safetensors.index.json").unlink()
    assert (pipeline_fingerprint(copy), encoders_fingerprint(Pipeline(copy))) == both


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_variants_do_not_count_as_no_library_is_asked_for_one(copy: Path, part: str) -> None:
    before, files = pipeline_fingerprint(copy), Pipeline(copy).weight_files(part)
    network = PARTS[part].from_pretrained(copy / part).bfloat16()
    network.save_pretrained(copy / part, variant="fp16", max_shard_size="20KB")
    network.save_pretrained(copy / part, variant="fp16")
    assert len(list((copy / part).glob("*fp16*"))) > 1
    own = Pipeline(copy)
    assert own.weight_files(part) == files and pipeline_fingerprint(copy) == before
    name, value = next(iter(read(own, part).items()))
    assert torch.equal(load_part(own, part, torch.float32).state_dict()[name], value)


@pytest.mark.parametrize("end", ["", ".index.json"])
def test_a_text_encoder_may_name_its_file(copy: Path, end: str) -> None:
    """transformers goes by its configuration's `transformers_weights`."""
    part = copy / "text_encoder_3"
    old, other = part / "model.safetensors", f"other.safetensors{end}"
    table = {name: value * 1.5 for name, value in load_file(old).items()}
    shard = part / ("a.safetensors" if end else other)
    save_file(table, shard, {"format": "pt"})
    if end:
        listed = {"metadata": {}, "weight_map": dict.fromkeys(table, shard.name)}
        (part / other).write_text(json.dumps(listed))
    before = encoders_fingerprint(Pipeline(copy))
    change(part / "config.json", "transformers_weights", other)
    own = Pipeline(copy)
    assert own.weight_files(part.name) == [shard.name] and encoders_fingerprint(own) != before
    check_pipeline(own.root)
    check_weights(own)
    loaded = load_part(own, part.name, torch.float32).state_dict()
    assert torch.equal(loaded["shared.weight"], table["shared.weight"])
    (part / other).unlink()
    with pytest.raises(ValueError, match=f": text_encoder_3/{other} missing"):
        check_pipeline(copy)


def test_what_is_missing_is_named(copy: Path) -> None:
    (copy / "vae" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"vae/{WEIGHTS} is missing"):
        pipeline_fingerprint(copy)


def test_an_adapter_counts_by_names_types_shapes_and_bits() -> None:
    a = {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor(2.0, dtype=torch.bfloat16)}
    own = adapter_fingerprint(a)
    assert own == adapter_fingerprint(dict(reversed(a.items())))
    others = [
        {**a, "x": torch.tensor([-0.0, 1.0])},
        {**a, "x": torch.tensor([[0.0, 1.0]])},
        {**a, "y": torch.tensor(2.0, dtype=torch.float16)},
        {"z": a["x"], "y": a["y"]},
        {"x": a["x"]},
    ]
    assert len({own, *map(adapter_fingerprint, others)}) == 6
