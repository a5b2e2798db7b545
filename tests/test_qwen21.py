"""Qwen-Image-2.1's particulars: its rows, its sentences, and what its processor is in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope
from students import PROMPTS, request, sampled, student

from tiltflow.formats.contract import read_contract
from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.qwen21 import positions_of

Tiny = Callable[[str], Path]


def load(path: Path, **options: Any) -> Any:
    return load_backbone(path, device="cpu", resolution=64, max_sequence_length=128, **options)


@pytest.fixture
def qwen21(tiny_pipeline: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline("qwen_image_21"), tmp_path / "qwen21"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_positions_are_the_transformers_own_for_a_prompt_alone() -> None:
    rope, height, width = QwenImage21Rope(10000, [4, 6, 6]), 4, 6
    for text in (1, 5):
        ours = positions_of(torch.tensor([text]), text, height, width)[0]
        pad = torch.tensor([False] * text + [True] * (height * width))
        theirs = rope([(1, height, width)], pad, torch.device("cpu"))
        made = torch.cat([t[at] for t, at in zip(rope.freqs, ours.unbind(-1), strict=True)], -1)
        assert torch.equal(made, theirs)


@torch.no_grad()
def test_a_longer_prompt_moves_an_image_in_the_pipelines_call_only(tiny_pipeline: Tiny) -> None:
    path, prompts = tiny_pipeline("qwen_image_21"), ["a", "a much longer prompt beside it"]
    pipe: Any = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    alone = pipe(prompts[:1], latents=x[:1].clone(), **call).images
    both = pipe(prompts, latents=x.clone(), **call).images
    assert (both[:1] - alone).abs().max() > 1e-3
    backbone = load(path)
    latents, level = x.transpose(1, 2).unflatten(2, (4, 4)), torch.tensor([0.7, 0.7])
    together, one = backbone.encode(prompts), backbone.encode(prompts[:1])
    v = backbone.velocity(backbone.teacher_base, latents, level, together)
    w = backbone.velocity(backbone.teacher_base, latents[:1], level[:1], one)
    assert torch.allclose(v[:1], w, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"sample_sigmas": [1.0, 0.5]}, "is step-distilled, so take Qwen-Im"),
        ("transformer/config.json", {"patch_size": 2}, "where a cell goes in and comes out"),
        ("transformer/config.json", {"patch_size": None}, "patch_size=None, out_channels=8"),
        ("transformer/config.json", {"context_in_dim": 32}, "its text encoder has hidden_size=16"),
        ("transformer/config.json", {"mlp_ratio": 65}, "mlp_ratio=65, which is no whole number"),
        ("vae/config.json", {"patch_size": 2}, "needs null, 4 and those of 16 pixels a cell"),
        ("vae/config.json", {"latents_std": [0.0] * 8}, "not the 8 numbers above 0"),
        ("vae/config.json", {"decoder_base_dim": 77}, "no weight of the size decoder_base_dim=77"),
    ],
)
def test_what_does_not_go_together(
    qwen21: Path, file: str, changes: dict[str, object], sentence: str
) -> None:
    edit(qwen21 / file, **changes)
    with pytest.raises(ValueError, match=sentence):
        load(qwen21)


def test_what_is_missing_or_too_long_is_a_sentence(qwen21: Path) -> None:
    backbone = load(qwen21)
    with pytest.raises(ValueError, match="text tokens, which this family does not cut: model.max"):
        backbone.encode(["long " * 50])
    with pytest.raises(ValueError, match="64x80 must be in both sides a positive multiple of 32"):
        load_backbone(qwen21, device="cpu", resolution=(64, 80))
    (qwen21 / "processor" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"processor/chat_template\.jinja missing"):
        load(qwen21)


@pytest.mark.long
def test_a_merged_student_keeps_its_processor(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """The whole folder of it, and the class in the index; the images are those of the LoRAs up to
    the rounding of merged sums."""
    made = student(tiny_pipeline, "qwen_image_21", tmp_path, formats=("diffusers", "merged"))
    merged = made.export / "merged"
    index = json.loads((merged / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]
    names = {file.name for file in (made.model / "processor").iterdir()}
    assert names <= {file.name for file in (merged / "processor").iterdir()}
    asked = request(made, seed=3)
    one, other = (
        sampled(asked),
        sampled(request(made, seed=3, model=str(merged), few_step=None, tilt_lora=None)),
    )
    assert one.shape == (len(PROMPTS), 3, 64, 64) and (one - other).abs().max() < 1e-4
    contract = read_contract(made.export / "tilt")
    assert contract is not None and contract.guidance == 1.0
    assert "qwen_image_21" in contract.text()
