"""What holds for every family, one entry of `families_table` each: its own pipeline's images to the
last bit, rows that do not know their neighbours, exact checkpointing, adapters that all learn."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families_table import CASES, PAIRS
from students import pictures
from torch import Tensor

from tiltflow.config.load import list_recipes, load_config
from tiltflow.flow import euler_step
from tiltflow.models.families import load_backbone
from tiltflow.models.family import BUILTIN, published
from tiltflow.models.pipelines.meta import META, meta_backbone
from tiltflow.models.pipelines.resized import resized
from tiltflow.models.roles import AdapterSettings, adapter_roles
from tiltflow.scheduler import pack

Tiny = Callable[[str], Path]
PROMPTS = ["a red cat", "two dogs and a very long story of what they did on the way home", "x"]
"""Below, above and far below the length at which texts are cut or filled up."""


@cache
def loaded(path: Path, tokens: int) -> Any:
    return load_backbone(path, device="cpu", resolution=64, max_sequence_length=tokens)


@cache
def pipeline(path: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(backbone: Any, batch: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    height, width = (
        side * cells // 64 for side, cells in zip(size, backbone.latent_shape[1:], strict=True)
    )
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, backbone.latent_shape[0], height, width, generator=generator)


def sampled(backbone: Any, x: Tensor, cond: Any, guidance: float | None) -> Tensor:
    """Three steps of the pipeline's own sampler: Euler's, or its scheduler's where that is another,
    which may know thousandths only."""

    def velocity(x: Tensor, level: Tensor) -> Tensor:
        v: Tensor = backbone.velocity(
            backbone.teacher_base, x, level.expand(len(x)), cond, guidance
        )
        assert v.dtype == torch.float32 and v.shape == x.shape
        return v

    if "flow_shift" in backbone.scheduler.config:
        own = type(backbone.scheduler).from_config(backbone.scheduler.config)
        own.set_timesteps(3)
        for t in own.timesteps:
            x = own.step(velocity(x, t.double() / 1000), t, x, return_dict=False)[0]
        return x
    for now, then in pairwise(backbone.teacher_sigmas(3)):
        x = euler_step(x, velocity(x, now), now.expand(len(x)), then.expand(len(x)))
    return x


def given(backbone: Any, x: Tensor) -> Tensor:
    """Latents as a pipeline's call takes them: plain, or packed tokens."""
    packed = backbone.record.token_patch > 1
    if backbone.family == "qwen_image_21":
        return x.flatten(2).transpose(1, 2)
    if backbone.family == "wan":
        return x.unsqueeze(2)  # a video of one frame
    return pack(x, backbone.geometry.patch) if packed else x.clone()


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_images_are_the_pipelines_to_the_last_bit(
    tiny_pipeline: Tiny, monkeypatch: pytest.MonkeyPatch, family: str, name: str, guided: bool
) -> None:
    case = CASES[family]
    backbone = loaded(tiny_pipeline(name), case.tokens)
    assert backbone.family == family
    monkeypatch.setattr(backbone, "batched_guidance", case.batched)
    call, guidance = case.guided if guided else (case.plain, None)
    # With guidance one prompt: here the empty one is encoded once and not once a prompt.
    prompts = PROMPTS[1:2] if guided or case.alone else PROMPTS
    for size in case.sizes:
        x, cond = noise(backbone, len(prompts), size), backbone.encode(prompts)
        made = pipeline(tiny_pipeline(name))(
            prompt=list(prompts),
            height=size[0],
            width=size[1],
            num_inference_steps=3,
            latents=given(backbone, x),
            output_type="pt",
            **call,
            **({"max_sequence_length": case.tokens} if backbone.record.takes_length else {}),
        )
        theirs = pictures(made)[:, :3]  # red, green, blue, and of some its opacity
        images = backbone.decode(sampled(resized(backbone, size), x, cond, guidance))
        assert images.shape == (len(prompts), 3, *size) and images.std() > 0.03
        assert (images - theirs).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_row_does_not_know_its_neighbours(tiny_pipeline: Tiny, family: str, name: str) -> None:
    """Up to the rounding of a product of another size; prompts are of different lengths."""
    backbone = loaded(tiny_pipeline(name), CASES[family].tokens)
    x, sigma = noise(backbone, 3), torch.tensor([0.9, 0.5, 0.1])
    together = backbone.encode(PROMPTS)
    both = backbone.velocity(backbone.teacher_base, x, sigma, together, 3.0)
    for i, prompt in enumerate(PROMPTS):
        alone, row = backbone.encode([prompt]), slice(i, i + 1)
        for key, value in alone.positive.items():
            assert torch.allclose(together.positive[key][row].float(), value.float(), atol=1e-5)
        one = backbone.velocity(backbone.teacher_base, x[row], sigma[row], alone, 3.0)
        assert torch.allclose(both[row], one, atol=2e-5)
    other = backbone.velocity(backbone.teacher_base, x, sigma, together[[1, 2, 0]], 3.0)
    assert ((other - both).abs().amax((1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_adapters_learn_and_checkpointing_is_exact(
    tiny_pipeline: Tiny, family: str, name: str
) -> None:
    case, found = CASES[family], []
    for checkpointing in (frozenset(), frozenset({"generator", "fake_score"})):
        backbone: Any = load_backbone(
            tiny_pipeline(name), device="cpu", resolution=64, max_sequence_length=case.tokens
        )
        settings = AdapterSettings(2, 4.0, backbone.lora_targets())
        roles = adapter_roles(backbone, settings, seed=0, checkpointing=checkpointing)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in roles.generator.parameters.values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        cond = backbone.encode(PROMPTS)
        v = roles.generator(noise(backbone, 3), torch.tensor([0.9, 0.5, 0.1]), cond)
        v.square().sum().backward()
        found.append({key: p.grad for key, p in roles.generator.parameters.items()})
    plain, again = found
    blocks = re.findall(r"\btransformer_blocks\.(\d+)\.", " ".join(plain))
    last = max(map(int, blocks), default=0)
    silent = tuple(end.format(last=last) for end in backbone.record.no_gradient)
    for key, gradient in plain.items():
        if key.split(".lora_")[0].endswith(silent):
            assert gradient is None or not gradient.any(), key
            continue
        assert gradient is not None and gradient.any(), key
        assert torch.equal(gradient, again[key]), key


def test_every_family_is_in_the_table() -> None:
    assert set(CASES) == {name for name, (pipeline, _) in BUILTIN.items() if pipeline}


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_shapes_on_the_meta_device_are_the_real_ones(
    tiny_pipeline: Tiny, family: str, name: str
) -> None:
    tokens = CASES[family].tokens
    real = loaded(tiny_pipeline(name), tokens)
    shapes = meta_backbone(tiny_pipeline(name), resolution=64, max_sequence_length=tokens)
    assert shapes.latent_shape == real.latent_shape
    assert torch.equal(shapes.few_step_sigmas(4), real.few_step_sigmas(4))
    made = real.encode(PROMPTS[:1]).positive
    assert {key: tuple(value.shape[1:]) for key, value in made.items()} == (
        shapes.conditioning_shapes()
    )


@pytest.mark.parametrize("family", [name for name, case in CASES.items() if case.recipe])
def test_the_published_geometry_and_its_recipes(family: str) -> None:
    case = CASES[family]
    names = [
        n for n in list_recipes() if n.startswith((f"{case.recipe}_cold", f"{case.recipe}_ti"))
    ]
    assert {f"{case.recipe}_cold_start", f"{case.recipe}_tilt"} <= set(names)
    for name in names:
        cfg = load_config(name, ["data.prompts=prompts.txt"])
        assert cfg.model.family == family
        for path in filter(None, (cfg.model.path, cfg.model.generator_path)):
            assert published(path) is not None
    backbone = meta_backbone(cfg.model.path, resolution=cfg.model.resolution)
    with META:
        settings = AdapterSettings(32, 64.0, backbone.lora_targets())
        state = adapter_roles(backbone, settings, seed=0).generator.state()
    trained = sum(value.numel() for value in state.values())
    assert (len(state) // 2, trained) == case.adapter
    network = backbone.student_base
    total = sum(p.numel() for n, p in network.named_parameters() if ".lora_" not in n)
    row = f"| {case.recipe} | {case.blocks} | {total:,} | {len(state) // 2} | {trained:,} |"
    assert row in (Path(__file__).parents[1] / "docs" / "backbones.md").read_text(), row
