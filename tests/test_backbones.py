"""Each family against its own pipeline's call: images, grids, default sizes."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import FAMILY, PROMPTS, Tiny, load, noise, shared
from diffusers import DiffusionPipeline
from tiny_pipelines import BUILDERS, RESOLUTION, TOKENS, build
from torch import Tensor

from tiltflow.flow import euler_step
from tiltflow.models.families import load_backbone

# Name, number of prompts, what the pipeline is called with, and the guidance that this is to us.
PLAIN: list[tuple[str, int, dict[str, Any], float]] = [
    ("sd3m", 2, {"guidance_scale": 1.0}, 1.0),
    ("sd3m_without_t5", 2, {"guidance_scale": 1.0}, 1.0),
    ("sd35m", 2, {"guidance_scale": 1.0}, 1.0),
    ("flux_dev", 2, {"guidance_scale": 3.5}, None),
    ("flux_dev", 2, {"guidance_scale": 1.0}, 1.0),
    ("flux_dev", 2, {"guidance_scale": 3.5}, 3.5),
    ("flux_dev", 2, {"guidance_scale": 2.0}, 2.0),
    ("flux_schnell", 2, {}, 1.0),
    ("klein_base", 2, {"guidance_scale": 1.0}, 1.0),
    ("klein", 2, {"guidance_scale": 1.0}, 1.0),
    ("z_image", 2, {"guidance_scale": 0.0}, 1.0),
    ("z_image_wide", 2, {"guidance_scale": 0.0}, None),
    ("z_image_turbo", 2, {"guidance_scale": 0.0}, 1.0),
]
# One prompt: we encode the empty prompt once and not once a prompt, which rounds differently.
GUIDED: list[tuple[str, int, dict[str, Any], float]] = [
    ("sd3m", 1, {"guidance_scale": 4.5}, 4.5),
    ("sd35m", 1, {"guidance_scale": 7.0}, 7.0),
    ("flux_schnell", 1, {"true_cfg_scale": 3.0, "negative_prompt": ""}, 3.0),
    ("klein_base", 1, {"guidance_scale": 4.0}, 4.0),
    ("z_image", 1, {"guidance_scale": 4.0}, 5.0),
    ("z_image_wide", 1, {"guidance_scale": 0.5}, 1.5),
]


@cache
def pipeline(path: Path) -> Any:
    absent = ("text_encoder_3", "tokenizer_3") if "without_t5" in str(path) else ()
    pipe = DiffusionPipeline.from_pretrained(path, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def our_images(backbone: Any, prompts: list[str], steps: int, guidance: float | None) -> Tensor:
    x, cond = noise(backbone, len(prompts)), backbone.encode(prompts)
    for now, then in pairwise(backbone.teacher_sigmas(steps)):
        level = now.expand(len(x))
        v = backbone.velocity(backbone.teacher_base, x, level, cond, guidance)
        assert v.dtype == torch.float32 and v.shape == x.shape
        x = euler_step(x, v, level, then.expand(len(x)))
    return backbone.decode(x)


def their_images(path: Path, prompts: list[str], steps: int, **call: Any) -> tuple[Tensor, Tensor]:
    """The pipeline's own images from its own draw of the noise, and its grid."""
    pipe = pipeline(path)
    images = pipe(
        prompt=prompts,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=steps,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **call,
    ).images
    return images, pipe.scheduler.sigmas


@pytest.mark.parametrize(("name", "batch", "call", "guidance"), PLAIN + GUIDED)
def test_loop_equals_the_pipelines_call(
    tiny_pipeline: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    batch: int,
    call: dict[str, Any],
    guidance: float | None,
) -> None:
    path, prompts = tiny_pipeline(name), PROMPTS[:batch]
    backbone = shared(path)
    assert backbone.family == FAMILY[name]
    # these pipelines run guidance as one batch, the others as two passes
    monkeypatch.setattr(backbone, "batched_guidance", backbone.family in ("sd3", "z_image"))
    images = our_images(backbone, prompts, 5, guidance)
    expected, _ = their_images(path, prompts, 5, **call)
    assert images.shape == (batch, 3, RESOLUTION, RESOLUTION)
    assert expected.std() > 0.05
    assert (images - expected).abs().max() == 0


@pytest.mark.parametrize(("name", "batch", "call", "guidance"), GUIDED)
def test_batched_guidance_is_two_passes_up_to_rounding(
    tiny_pipeline: Tiny, name: str, batch: int, call: dict[str, Any], guidance: float | None
) -> None:
    backbone = load(tiny_pipeline(name))
    assert backbone.batched_guidance
    images = our_images(backbone, PROMPTS, 3, guidance)
    backbone.batched_guidance = False
    assert torch.allclose(images, our_images(backbone, PROMPTS, 3, guidance), atol=1e-5)
    without = our_images(backbone, PROMPTS, 3, 1.0)
    assert (images - without).abs().max() > 1e-3
    theirs, _ = their_images(tiny_pipeline(name), PROMPTS[:1], 3, **call)
    assert torch.allclose(images[:1], theirs, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_grids_are_the_schedulers(tiny_pipeline: Tiny, name: str) -> None:
    path = tiny_pipeline(name)
    backbone = shared(path)
    call = {"flux": {}, "z_image": {"guidance_scale": 0.0}}.get(
        FAMILY[name], {"guidance_scale": 1.0}
    )
    for steps in (4, 7):
        grid = backbone.teacher_sigmas(steps)
        assert torch.equal(grid, their_images(path, PROMPTS[:1], steps, **call)[1])
        few = backbone.few_step_sigmas(steps)
        assert few.dtype == torch.float32 and len(few) == steps + 1
        assert few[0] == 1 and few[-1] == 0 and bool((few.diff() < 0).all())
        if FAMILY[name] == "sd3":
            continue
        assert torch.equal(few, grid)
    with pytest.raises(ValueError, match="at least 1 step"):
        backbone.few_step_sigmas(0)


def test_known_grids(tiny_pipeline: Tiny) -> None:
    sd3 = shared(tiny_pipeline("sd3m"))
    assert torch.equal(sd3.few_step_sigmas(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    schnell = shared(tiny_pipeline("flux_schnell"))
    assert torch.equal(schnell.few_step_sigmas(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    # 1024 pixels are 4,096 tokens, the end of FLUX's line: mu is max_shift = 1.15.
    large = load(tiny_pipeline("flux_dev"), resolution=1024)
    shifted = [1 / (1 + math.exp(-1.15) * (1 / u - 1)) for u in (1, 0.75, 0.5, 0.25)]
    assert torch.allclose(large.few_step_sigmas(4), torch.tensor([*shifted, 0]), atol=1e-6)
    small = shared(tiny_pipeline("flux_dev"))
    assert (small.few_step_sigmas(4) - large.few_step_sigmas(4)).abs().max() > 0.1


def test_default_sizes(tiny_pipeline: Tiny) -> None:
    """Without arguments: the model's own resolution, the pipeline's own number of tokens."""
    expected = {
        "sd3m": ((16, 8, 8), 256, 7.0),
        "flux_dev": ((16, 128, 128), 512, 3.5),
        "flux_schnell": ((16, 128, 128), 512, 1.0),
        "klein_base": ((128, 64, 64), 512, 4.0),
        "klein": ((128, 64, 64), 512, 1.0),
        "z_image": ((16, 128, 128), 512, 6.0),
    }
    for name, (shape, sequence, guidance) in expected.items():
        backbone = load_backbone(tiny_pipeline(name), device="cpu")
        made = (backbone.latent_shape, backbone.sequence, backbone.guidance)  # type: ignore[attr-defined]
        assert made == (shape, sequence, guidance)


def test_tiny_pipelines_are_alike_for_a_seed(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    first = tiny_pipeline("klein")
    second, third = (build("klein", tmp_path / str(seed), seed) for seed in (0, 1))
    weights = [file.relative_to(first) for file in sorted(first.rglob("*.safetensors"))]
    assert len(weights) == 3
    for file in weights:
        assert (first / file).read_bytes() == (second / file).read_bytes()
        assert (first / file).read_bytes() != (third / file).read_bytes()
