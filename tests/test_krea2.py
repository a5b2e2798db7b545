"""What Krea 2 alone has: arguments in its index, two shifts, and states of several layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.fingerprint import encoder_facts
from tiltflow.models.pipelines.meta import meta_backbone, text_encoders

Tiny = Callable[[str], Path]


def load(path: Path, **options: Any) -> Any:
    return load_backbone(path, device="cpu", resolution=64, **options)


@pytest.fixture
def krea2(tiny_pipeline: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline("krea2"), tmp_path / "krea2"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_whole_numbers_in_the_index_are_no_part(tiny_pipeline: Tiny, krea2: Path) -> None:
    pipeline = Pipeline(krea2)
    assert set(pipeline.networks) == {"transformer", "vae", "text_encoder"}
    assert set(text_encoders(krea2)) == {"text_encoder"} and pipeline.absent == {}
    edit(krea2 / "model_index.json", text_encoder_select_layers=[0, 0, 0])
    assert Pipeline(krea2).absent == {}
    facts = {"dtype": "fp32", "device": "cpu", "max_sequence_length": 32, "batch_size": 1}
    one, two = (encoder_facts(Pipeline(p), **facts) for p in (tiny_pipeline("krea2"), krea2))
    assert one != two, "embeddings of other layers are others"
    found = [
        load(path, max_sequence_length=32).encode(["a cat"]).positive["prompt_embeds"]
        for path in (tiny_pipeline("krea2"), krea2)
    ]
    assert torch.equal(found[0][..., 0, :], found[1][..., 0, :])
    assert torch.equal(found[1][..., 0, :], found[1][..., 2, :])
    assert not torch.equal(found[0], found[1])


def test_a_students_grid_is_by_the_pipeline_that_it_is_sampled_in(tiny_pipeline: Tiny) -> None:
    raw, turbo = tiny_pipeline("krea2"), tiny_pipeline("krea2_turbo")
    alone, distilled, both = load(raw), load(turbo), load(raw, generator_path=turbo)
    expected = [1.0, 0.9045, 0.7595, 0.5129, 0.0]
    assert torch.allclose(distilled.few_step_sigmas(4), torch.tensor(expected), atol=1e-4)
    assert torch.equal(both.few_step_sigmas(4), distilled.few_step_sigmas(4))
    assert torch.equal(both.teacher_sigmas(4), alone.teacher_sigmas(4))
    assert not torch.equal(alone.few_step_sigmas(4), distilled.few_step_sigmas(4))
    shapes = meta_backbone(raw, generator_path=turbo, resolution=64)
    assert torch.equal(shapes.few_step_sigmas(4), both.few_step_sigmas(4))
    assert (alone.guidance, distilled.guidance, both.guidance) == (5.5, 1.0, 5.5)
    with pytest.raises(ValueError, match="the teacher in .* is step-distilled: .* Krea 2 Raw"):
        load(turbo, generator_path=raw)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"text_encoder_select_layers": [0, 1]}, "are not 3 .num_text_layers"),
        ("model_index.json", {"text_encoder_select_layers": [0, 1, 4]}, "the states 0 to 3 of its"),
        ("model_index.json", {"text_encoder_select_layers": "012"}, "select_layers='012'"),
        ("model_index.json", {"text_encoder_select_layers": [0, 1, "2"]}, "is no class of diffus"),
        ("model_index.json", {"patch_size": 3}, "takes 32 channels but the autoencoder makes 72"),
        ("model_index.json", {"patch_size": 0}, "patch_size=0, which is no whole number"),
        ("transformer/config.json", {"num_key_value_heads": 3}, "no multiple of num_key_value_he"),
        ("transformer/config.json", {"text_num_key_value_heads": 4}, "no multiple of text_num_key"),
        ("transformer/config.json", {"num_layerwise_text_blocks": 10**6}, "from 0 to 1000"),
        ("transformer/config.json", {"text_hidden_dim": 10**6 + 1}, "from 1 to 1000000"),
        ("transformer/config.json", {"text_intermediate_size": 77}, "no weight of the size"),
    ],
)
def test_what_does_not_go_together(
    krea2: Path, file: str, changes: dict[str, object], sentence: str
) -> None:
    edit(krea2 / file, **changes)
    with pytest.raises(ValueError, match=sentence):
        load(krea2)


def test_a_generator_that_reads_other_states_is_refused(tiny_pipeline: Tiny, krea2: Path) -> None:
    """A student is given the teacher's embeddings: other layers' would be another prompt."""
    edit(krea2 / "model_index.json", text_encoder_select_layers=[1, 2, 3])
    sentence = r"select_layers=\[1, 2, 3\] in its model_index.json but .* has \[0, 1, 2\]"
    with pytest.raises(ValueError, match=sentence):
        load(tiny_pipeline("krea2"), generator_path=krea2)
    edit(krea2 / "model_index.json", text_encoder_select_layers=[0, 1, 2])
    load(tiny_pipeline("krea2"), generator_path=krea2)


def test_a_prompt_has_the_templates_end_behind_it(krea2: Path) -> None:
    with pytest.raises(ValueError, match="max_sequence_length=5 must be from 6 to 512"):
        load(krea2, max_sequence_length=5)
    short, long = (load(krea2, max_sequence_length=n) for n in (24, 64))
    x = torch.randn(2, *short.latent_shape, generator=torch.Generator().manual_seed(0))
    level, prompts = torch.tensor([0.9, 0.3]), ["a red cat", "x"]
    one, two = (
        model.velocity(model.teacher_base, x, level, model.encode(prompts), 3.0)
        for model in (short, long)
    )
    assert torch.allclose(one, two, atol=1e-5) and one.std() > 0.1
