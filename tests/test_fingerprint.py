"""Which weights a pipeline or an adapter holds, told by their content alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiltflow.models.pipelines import fingerprint
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint, pipeline_fingerprint

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
