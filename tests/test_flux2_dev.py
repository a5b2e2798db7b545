"""What FLUX.2-dev alone has: a processor as its tokenizer, and a text encoder with an eye."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiltflow.models.families import load_backbone

Tiny = Callable[[str], Path]


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_of_a_processor_the_tokenizer_is_enough(
    tiny_pipeline: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the published index has it. The processor itself asks for torchvision."""
    given = tiny_pipeline("flux2_dev")
    other = shutil.copytree(given, tmp_path / "other")
    edited(other / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    found = [
        load_backbone(path, device="cpu", resolution=64, max_sequence_length=32).encode(["a cat"])
        for path in (given, other)
    ]
    one, two = (cond.positive["prompt_embeds"] for cond in found)
    assert torch.equal(one, two) and one.std() > 0.01
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 29}, "29 layers, but FLUX.2-dev is conditioned on .* 10, 20, 30"),
        ({"hidden_size": 8}, "joint_attention_dim=48, which is not 3 × hidden_size=8"),
    ],
)
def test_a_text_encoder_of_another_size(
    tiny_pipeline: Tiny, tmp_path: Path, changes: dict[str, int], sentence: str
) -> None:
    model = shutil.copytree(tiny_pipeline("flux2_dev"), tmp_path / "model")
    config = model / "text_encoder" / "config.json"
    text = json.loads(config.read_text())["text_config"]
    edited(config, text_config=text | changes)
    with pytest.raises(ValueError, match=sentence):
        load_backbone(model, device="cpu", resolution=64)


def test_guidance_is_always_an_input(tiny_pipeline: Tiny) -> None:
    model = load_backbone(tiny_pipeline("flux2_dev"), device="cpu", resolution=64)
    assert model.student_guidance == model.guidance == 4.0 and model.passes(7.0) == 1
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, level = model.encode(["a cat"]), torch.tensor([0.5])
    plain, four, one = (model.velocity(model.teacher_base, x, level, cond, g) for g in (None, 4, 1))
    assert torch.equal(plain, four) and (plain - one).abs().max() > 1e-4
