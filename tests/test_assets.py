"""The embedded model: plain libraries load it, and it is what its card says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel

import tiltflow
from tiltflow.flow import euler_step
from tiltflow.models.families import load_backbone
from tiltflow.rewards.worlds import shapes
from tiltflow.rewards.worlds.shapes_checker import read_scene, score

ASSETS = Path(tiltflow.__file__).parent / "assets"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    made = StableDiffusion3Pipeline.from_pretrained(
        ASSETS / "pipeline", text_encoder_3=None, tokenizer_3=None
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_size_and_formats() -> None:
    files = [f for f in ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 40e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.parametrize("name", ["clip", "clip_heldout"])
def test_clips_load_and_know_the_world(name: str) -> None:
    from tiltflow.rewards.zoo.clip_family import CLIPScore

    CLIPModel.from_pretrained(ASSETS / name)
    reward = CLIPScore(str(ASSETS / name))
    rng = np.random.default_rng(0)
    captions = shapes.balanced(True, 48)
    images = np.stack([shapes.render(shapes.sample_scene(c, rng)) for c in captions])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    texts = [c.text for c in captions]
    right = reward(x, texts, [{}] * 48)
    wrong = reward(x, texts[7:] + texts[:7], [{}] * 48)
    assert float((right > wrong).float().mean()) > 0.75


def test_our_loop_is_the_pipelines_own(pipe: StableDiffusion3Pipeline) -> None:
    backbone = load_backbone(ASSETS / "pipeline", device="cpu")
    x = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        "a red circle", num_inference_steps=4, guidance_scale=4.0, latents=x.clone(),
        max_sequence_length=0, output_type="pt",
    ).images  # fmt: skip
    cond, grid = backbone.encode(["a red circle"]), backbone.teacher_sigmas(4)
    with torch.no_grad():
        for now, then in itertools.pairwise(grid):
            v = backbone.velocity(backbone.teacher_base, x, now.expand(1), cond, 4.0)
            x = euler_step(x, v, now.expand(1), then.expand(1))
        ours = backbone.decode(x)
    assert torch.equal(ours, theirs)


@pytest.mark.long
def test_the_teacher_is_as_good_as_its_card(pipe: StableDiffusion3Pipeline) -> None:
    """Through the plain pipeline in 16 steps, with and without the absent encoder's zero tokens."""
    figures = json.loads((ASSETS / "figures.json").read_text())
    card = figures["teacher_50_steps_guidance_1.5"]["soft"]
    for tokens, count in ((0, 48), (256, 18)):  # the zeros take three times as long
        captions = shapes.balanced(True, count)
        images = pipe(
            [c.text for c in captions], num_inference_steps=16, guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0), max_sequence_length=tokens,
            output_type="np",
        ).images  # fmt: skip
        pixels = (images * 255).round().astype(np.uint8)
        soft = np.mean([score(read_scene(i), c)[1] for i, c in zip(pixels, captions, strict=True)])
        assert soft > card - (0.25 if tokens else 0.15), (tokens, soft, card)
