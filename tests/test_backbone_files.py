"""What `check_pipeline` and `load_backbone` refuse, and that they do so before loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from tiny_pipelines import RESOLUTION

from tiltflow.models.families import check_pipeline, load_backbone
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.files import check_teacher

Tiny = Callable[[str], Path]


@pytest.fixture
def sd3(tiny_pipeline: Tiny, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "sd3m")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "family"),
    [("sd3m_without_t5", "sd3"), ("sd35m", "sd3"), ("flux_schnell", "flux"), ("klein", "flux2")],
)
def test_family_is_read_off_the_index(tiny_pipeline: Tiny, name: str, family: str) -> None:
    assert check_pipeline(tiny_pipeline(name)) == family
    assert check_pipeline(tiny_pipeline(name), family) == family


def test_the_mixture_has_no_files() -> None:
    assert check_pipeline("mixture") == check_pipeline("anything", "mixture") == "mixture"
    assert load_backbone(None, family="mixture", device="cpu").family == "mixture"
    with pytest.raises(ValueError, match="generator_path is for family flux2, z_image, krea2"):
        load_backbone("mixture", generator_path="klein", device="cpu")


def test_wrong_directories(sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no directory .*nowhere"):
        check_pipeline(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        check_pipeline(tmp_path / "empty")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline .family sd3., not .* flux2"):
        check_pipeline(sd3, "flux2")
    with pytest.raises(
        ValueError,
        match="'sdxl' is none of sd3, .*, qwen_image, qwen_image_21, krea2, wan, mixture",
    ):
        check_pipeline(sd3, "sdxl")
    edit(sd3 / "model_index.json", _class_name="HunyuanVideoPipeline")
    with pytest.raises(
        ValueError,
        match="holds a HunyuanVideoPipeline, which is none of .*, WanPipeline; a family can be",
    ):
        check_pipeline(sd3)
    (sd3 / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_pipeline(sd3)


def test_missing_files_are_listed(sd3: Path, no_weights: None) -> None:
    (sd3 / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (sd3 / "text_encoder_3" / "config.json").unlink()
    shutil.rmtree(sd3 / "tokenizer_2")
    shutil.rmtree(sd3 / "scheduler")
    with pytest.raises(ValueError, match="is not a complete StableDiffusion3Pipeline") as error:
        load_backbone(sd3, device="cpu")
    for file in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder_3/config.json",
        "tokenizer_2/tokenizer.json",
        "scheduler/scheduler_config.json",
    ):
        assert file in str(error.value)
    assert "transformer" not in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_parts_and_shards_are_listed(sd3: Path) -> None:
    weights = sd3 / "transformer" / "diffusion_pytorch_model.safetensors"
    first, second = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    weights.rename(sd3 / "transformer" / first)
    index = sd3 / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": first, "b": second}}))
    with pytest.raises(ValueError, match=f": transformer/{second} missing"):
        check_pipeline(sd3)
    # a pickle in its place is no help: nothing unpickles
    (sd3 / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    index.unlink()
    with pytest.raises(ValueError, match=r": transformer/diffusion_pytorch_model\.safetensors mis"):
        check_pipeline(sd3)
    (sd3 / "transformer" / first).rename(weights)
    assert check_pipeline(sd3) == "sd3"
    edit(sd3 / "model_index.json", vae=[None, None])
    shutil.rmtree(sd3 / "vae")
    with pytest.raises(ValueError, match=r": vae/config\.json, vae/diffusion_pytorch_model"):
        check_pipeline(sd3)


def test_an_older_index_beside_a_newer_file_is_named(sd3: Path) -> None:
    """diffusers goes by the index, so that the file which was saved over it does not load."""
    index = sd3 / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"transformer/a\.safetensors missing .an index names the"):
        check_pipeline(sd3)


def test_a_merged_student_is_a_pipeline_and_no_teacher(sd3: Path) -> None:
    check_teacher(Pipeline(sd3))
    edit(sd3 / "model_index.json", scheduler=["tiltflow.scheduler", "CPSFlowMatchScheduler"])
    assert check_pipeline(sd3) == "sd3"
    with pytest.raises(ValueError, match="is a merged student .* and cannot be a teacher: give"):
        check_teacher(Pipeline(sd3))


@pytest.mark.parametrize("resolution", [0, -64, 60, 1024])
def test_resolution_is_checked_before_weights_load(
    sd3: Path, no_weights: None, resolution: int
) -> None:
    with pytest.raises(ValueError, match="positive multiple of 16 and at most 512"):
        load_backbone(sd3, device="cpu", resolution=resolution)


def test_parts_of_two_models(sd3: Path, no_weights: None) -> None:
    edit(sd3 / "vae" / "config.json", latent_channels=4)
    with pytest.raises(ValueError, match="takes 16 channels but the autoencoder makes 4"):
        load_backbone(sd3, device="cpu")


def test_generator_paths(tiny_pipeline: Tiny, tmp_path: Path, no_weights: None) -> None:
    klein, base, sd3 = (tiny_pipeline(name) for name in ("klein", "klein_base", "sd3m"))
    with pytest.raises(ValueError, match="is for family flux2, z_image, krea2, not for sd3"):
        load_backbone(sd3, generator_path=klein, device="cpu")
    with pytest.raises(ValueError, match="the teacher in .* is step-distilled"):
        load_backbone(klein, generator_path=base, device="cpu")
    with pytest.raises(ValueError, match="family sd3., not one of family flux2"):
        load_backbone(base, generator_path=sd3, device="cpu")
    larger = shutil.copytree(klein, tmp_path / "larger")
    edit(larger / "transformer" / "config.json", joint_attention_dim=64)
    with pytest.raises(ValueError, match="joint_attention_dim=64 but the one .* has 48"):
        load_backbone(base, generator_path=larger, device="cpu")
    with pytest.raises(ValueError, match=r"model\.path is unset"):
        load_backbone(None, device="cpu")


def test_side_file_gives_defaults(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    sd3 = shutil.copytree(tiny_pipeline("sd3m_without_t5"), tmp_path / "sd3m")
    (sd3 / "tiltflow.json").write_text(json.dumps({"guidance": 3.0, "max_sequence_length": 0}))
    backbone: Any = load_backbone(sd3, device="cpu", resolution=RESOLUTION)
    assert (backbone.guidance, backbone.sequence) == (3.0, 0)
    chosen: Any = load_backbone(sd3, device="cpu", max_sequence_length=24)
    assert chosen.sequence == 24


@pytest.mark.parametrize("name", ["sd3m", "flux_schnell", "klein_base"])
@pytest.mark.parametrize("length", [0, 513, 10**9])
def test_lengths_that_the_pipeline_would_refuse(
    tiny_pipeline: Tiny, no_weights: None, name: str, length: int
) -> None:
    """0 is refused where there are tokens to cut: tokenizers take it for no limit at all."""
    with pytest.raises(
        ValueError, match=f"model.max_sequence_length={length} must be from 1 to 512"
    ):
        load_backbone(tiny_pipeline(name), device="cpu", max_sequence_length=length)


def test_missing_tokenizer_files(sd3: Path, tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """Each would make transformers load something else without a word."""
    (sd3 / "tokenizer_2" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r": tokenizer_2/tokenizer_config\.json missing"):
        check_pipeline(sd3)
    shutil.copy(sd3 / "tokenizer" / "tokenizer_config.json", sd3 / "tokenizer_2")
    (sd3 / "tokenizer" / "tokenizer.json").rename(sd3 / "tokenizer" / "vocab.json")
    with pytest.raises(ValueError, match=r": tokenizer/tokenizer\.json missing"):
        check_pipeline(sd3)
    (sd3 / "tokenizer" / "merges.txt").touch()
    assert check_pipeline(sd3) == "sd3"
    klein = shutil.copytree(tiny_pipeline("klein"), tmp_path / "klein")
    (klein / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r": tokenizer/chat_template\.jinja missing"):
        check_pipeline(klein)
