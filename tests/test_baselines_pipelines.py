"""The baselines that look into a pipeline's teacher: its guidance apart, its blocks' features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families_table import CASES
from lengths import mostly_long
from test_families_training import run

from tiltflow.core.randomness import Randomness
from tiltflow.models.families import load_backbone
from tiltflow.models.roles import Role
from tiltflow.training.adversarial import Features, Head

Tiny = Callable[[str], Path]
FEW = mostly_long(sorted(CASES), "sd3")


@pytest.mark.parametrize("family", FEW)
def test_every_familys_blocks_have_features_of_the_image(family: str, tiny_pipeline: Tiny) -> None:
    case = CASES[family]
    backbone = load_backbone(
        tiny_pipeline(case.names[0]), family=family, device="cpu", resolution=64,
        max_sequence_length=case.tokens,
    )  # fmt: skip
    cond = backbone.encode(["a red cat", "two dogs"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *backbone.latent_shape, generator=generator).requires_grad_()
    features = Features(Role("fake_score", backbone, backbone.teacher_base))
    found = features(x, torch.tensor([0.3, 0.7]), cond)
    logits = Head(found.shape[-1], Randomness(0))(found)
    assert found.shape[0] == 2 and logits.shape == (2,)
    logits[0].backward()
    assert x.grad is not None and bool(x.grad[0].any()) and not bool(x.grad[1].any())


@pytest.mark.parametrize("family", FEW)
def test_a_samples_features_do_not_know_its_neighbours(family: str, tiny_pipeline: Tiny) -> None:
    """Beside a longer prompt, which some families fill the others' places up to."""
    case = CASES[family]
    backbone = load_backbone(
        tiny_pipeline(case.names[0]), family=family, device="cpu", resolution=64,
        max_sequence_length=max(case.tokens, 96),
    )  # fmt: skip
    cond = backbone.encode(["cat", "a red cat and two dogs on a hill by the sea, and a house"])
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    features, levels = Features(Role("fake_score", backbone, backbone.teacher_base)), x.new_ones(2)
    beside, alone = features(x, levels / 2, cond), features(x[:1], levels[:1] / 2, cond[:1])
    head = Head(beside.shape[-1], Randomness(0))
    torch.testing.assert_close(head(beside)[:1], head(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_guidance_apart_is_another_gradient_and_goes_on_where_it_stopped(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    """On the tiny SD3, whose teacher is guided."""
    own = ("cold_start.objective=decoupled",)
    whole = run("cold_start", "sd3", tiny_pipeline, tmp_path / "whole", *own)
    plain = run("cold_start", "sd3", tiny_pipeline, tmp_path / "plain")
    name = next(name for name in whole if name.startswith("generator/"))
    assert not torch.equal(whole[name], plain[name])
    run("cold_start", "sd3", tiny_pipeline, tmp_path / "parts", *own, "train.steps=1")
    resumed = run("cold_start", "sd3", tiny_pipeline, tmp_path / "parts", *own, "run.resume=true")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.long
def test_a_discriminator_on_a_pipeline_goes_on_where_it_stopped(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    run("cold_start", "sd3", tiny_pipeline, tmp_path / "cold")
    own = ("tilt.terms={gan: {real_steps: 2, one_in: 2}}", f"model.few_step={tmp_path / 'cold'}")
    whole = run("tilt", "sd3", tiny_pipeline, tmp_path / "whole", *own)
    run("tilt", "sd3", tiny_pipeline, tmp_path / "parts", *own, "train.steps=1")
    resumed = run("tilt", "sd3", tiny_pipeline, tmp_path / "parts", *own, "run.resume=true")
    assert any(name.startswith("gan_head/") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
