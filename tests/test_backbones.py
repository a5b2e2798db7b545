"""Each family against its own pipeline's call, and what the protocol promises beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import BUILDERS, RESOLUTION, TOKENS, build
from torch import Tensor

from tiltflow.backbones import load_backbone
from tiltflow.flow import euler_step
from tiltflow.roles import AdapterSettings, adapter_roles, copy_roles

Tiny = Callable[[str], Path]
PROMPTS = ["a red cat", "two dogs"]
FAMILY = {name: "sd3" if name.startswith("sd3") else "flux" for name in BUILDERS}
FAMILY |= {"klein": "flux2", "klein_base": "flux2"}

# Name, number of prompts, what the pipeline is called with, and the guidance that this is to us.
PLAIN: list[tuple[str, int, dict[str, Any], float]] = [
    ("sd3m", 2, {"guidance_scale": 1.0}, 1.0),
    ("sd3m_without_t5", 2, {"guidance_scale": 1.0}, 1.0),
    ("sd35m", 2, {"guidance_scale": 1.0}, 1.0),
    ("flux_dev", 2, {"guidance_scale": 3.5}, 1.0),
    ("flux_dev", 2, {"guidance_scale": 3.5}, 3.5),
    ("flux_dev", 2, {"guidance_scale": 2.0}, 2.0),
    ("flux_schnell", 2, {}, 1.0),
    ("klein_base", 2, {"guidance_scale": 1.0}, 1.0),
    ("klein", 2, {"guidance_scale": 1.0}, 1.0),
]
# One prompt: we encode the empty prompt once and not once a prompt, which rounds differently.
GUIDED: list[tuple[str, int, dict[str, Any], float]] = [
    ("sd3m", 1, {"guidance_scale": 4.5}, 4.5),
    ("sd35m", 1, {"guidance_scale": 7.0}, 7.0),
    ("flux_schnell", 1, {"true_cfg_scale": 3.0, "negative_prompt": ""}, 3.0),
    ("klein_base", 1, {"guidance_scale": 4.0}, 4.0),
]


def load(path: Path, **options: Any) -> Any:
    options = {"resolution": RESOLUTION, "max_sequence_length": TOKENS} | options
    return load_backbone(path, device="cpu", **options)


@cache
def shared(path: Path) -> Any:
    """The backbone of a directory, for tests that leave it as it is."""
    return load(path)


@cache
def pipeline(path: Path) -> Any:
    absent = ("text_encoder_3", "tokenizer_3") if "without_t5" in str(path) else ()
    pipe = DiffusionPipeline.from_pretrained(path, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(backbone: Any, batch: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *backbone.latent_shape, generator=generator)


@torch.no_grad()
def our_images(backbone: Any, prompts: list[str], steps: int, guidance: float) -> Tensor:
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
    guidance: float,
) -> None:
    path, prompts = tiny_pipeline(name), PROMPTS[:batch]
    backbone = shared(path)
    assert backbone.family == FAMILY[name]
    # SD3's pipeline runs guidance as one batch, the others as two passes
    monkeypatch.setattr(backbone, "batched_guidance", backbone.family == "sd3")
    images = our_images(backbone, prompts, 5, guidance)
    expected, _ = their_images(path, prompts, 5, **call)
    assert images.shape == (batch, 3, RESOLUTION, RESOLUTION)
    assert expected.std() > 0.05
    assert (images - expected).abs().max() == 0


@pytest.mark.parametrize(("name", "batch", "call", "guidance"), GUIDED)
def test_batched_guidance_is_two_passes_up_to_rounding(
    tiny_pipeline: Tiny, name: str, batch: int, call: dict[str, Any], guidance: float
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
    call = {} if FAMILY[name] == "flux" else {"guidance_scale": 1.0}
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
    }
    for name, (shape, sequence, guidance) in expected.items():
        backbone = load_backbone(tiny_pipeline(name), device="cpu")
        made = (backbone.latent_shape, backbone.sequence, backbone.guidance)  # type: ignore[attr-defined]
        assert made == (shape, sequence, guidance)


@pytest.mark.parametrize("name", BUILDERS)
def test_encode(tiny_pipeline: Tiny, name: str) -> None:
    backbone = load(tiny_pipeline(name))
    cond, again = backbone.encode(PROMPTS), backbone.encode(["", PROMPTS[1]])
    assert len(cond) == 2 and set(cond.positive) == set(cond.negative)
    clip = {"sd3": 16, "flux": 0, "flux2": 0}[backbone.family]
    assert cond.positive["prompt_embeds"].shape[1] == TOKENS + clip
    for key, value in cond.positive.items():
        assert (value[0] - value[1]).abs().max() > 1e-3
        assert torch.equal(cond.negative[key][0], cond.negative[key][1])
        assert torch.allclose(cond.negative[key][0], again.positive[key][0], atol=1e-5)
        assert torch.allclose(value[1], again.positive[key][1], atol=1e-5)
    backbone.free_text_encoders()
    with pytest.raises(RuntimeError, match="text encoders were freed"):
        backbone.encode(PROMPTS)
    v = backbone.velocity(backbone.teacher_base, noise(backbone, 2), torch.full((2,), 0.5), cond)
    assert torch.isfinite(v).all()


@torch.no_grad()
def test_klein_conditions_on_hidden_states_9_18_27(tiny_pipeline: Tiny) -> None:
    backbone = shared(tiny_pipeline("klein_base"))
    pipe = backbone.pipe
    chat = [{"role": "user", "content": PROMPTS[0]}]
    text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>assistant" in text
    tokens = pipe.tokenizer(
        text, return_tensors="pt", padding="max_length", truncation=True, max_length=TOKENS
    )
    states = pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states
    assert len(states) == 29
    expected = torch.cat([states[9], states[18], states[27]], dim=-1)
    assert torch.equal(backbone.encode(PROMPTS[:1]).positive["prompt_embeds"], expected)


def test_packing_is_the_pipelines_and_loses_nothing(tiny_pipeline: Tiny) -> None:
    flux = shared(tiny_pipeline("flux_dev"))
    x = torch.randn(2, 16, 4, 6)
    tokens = flux._pack(x)
    assert tokens.shape == (2, 6, 64)
    assert torch.equal(tokens[0, 0].view(16, 2, 2), x[0, :, :2, :2])
    assert torch.equal(flux._unpack(tokens, 4, 6), x)
    klein = shared(tiny_pipeline("klein_base"))
    x = torch.randn(2, 128, 4, 6)
    tokens, ids = klein.pipe._pack_latents(x), klein.pipe._prepare_latent_ids(x)
    assert torch.equal(klein._unpack(tokens, 4, 6), x)
    assert torch.equal(klein.pipe._unpack_latents_with_ids(tokens, ids, 4, 6), x)
    assert torch.equal(klein._image_ids(x), ids[:1])


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_velocity_reads_each_samples_level_and_prompt(tiny_pipeline: Tiny, name: str) -> None:
    backbone = shared(tiny_pipeline(name))
    x, cond, sigma = noise(backbone, 2), backbone.encode(PROMPTS), torch.tensor([0.9, 0.3])
    base = backbone.teacher_base
    v = backbone.velocity(base, x, sigma, cond)
    for i in range(2):
        row = slice(i, i + 1)
        alone = backbone.velocity(base, x[row], sigma[row], cond[row])
        assert torch.allclose(v[row], alone, atol=1e-5)
    assert (v - backbone.velocity(base, x, sigma.flip(0), cond)).abs().max() > 1e-3
    assert (v - backbone.velocity(base, x, sigma, cond[[1, 0]])).abs().max() > 1e-3


@torch.no_grad()
def test_flux_dev_embeds_guidance_in_one_pass(tiny_pipeline: Tiny) -> None:
    backbone = load(tiny_pipeline("flux_dev"))
    x, cond, sigma = noise(backbone, 1), backbone.encode(PROMPTS[:1]), torch.tensor([0.7])

    def v(guidance: float) -> Tensor:
        return backbone.velocity(backbone.teacher_base, x, sigma, cond, guidance)

    assert backbone.guidance == backbone.embedded_guidance == 3.5
    assert torch.equal(v(1.0), v(3.5))
    other = v(2.0)
    assert (other - v(1.0)).abs().max() > 1e-4
    backbone.embedded_guidance = 2.0
    assert torch.equal(v(1.0), other)


def test_distilled_klein_refuses_guidance(tiny_pipeline: Tiny) -> None:
    backbone = shared(tiny_pipeline("klein"))
    cond = backbone.encode(PROMPTS[:1])
    with pytest.raises(ValueError, match="step-distilled and takes guidance 1"):
        backbone.velocity(backbone.teacher_base, noise(backbone, 1), torch.ones(1), cond, 4.0)


def test_generator_on_klein_and_teacher_on_klein_base(tiny_pipeline: Tiny) -> None:
    klein, base = shared(tiny_pipeline("klein")), shared(tiny_pipeline("klein_base"))
    both = load(tiny_pipeline("klein_base"), generator_path=tiny_pipeline("klein"))
    assert base.student_base is base.teacher_base
    for ours, theirs in ((both.student_base, klein), (both.teacher_base, base)):
        state, expected = ours.state_dict(), theirs.teacher_base.state_dict()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert not any(p.requires_grad for p in ours.parameters())
    weight = "x_embedder.weight"
    different = both.student_base.state_dict()[weight] - both.teacher_base.state_dict()[weight]
    assert different.abs().max() > 0.01
    cond, x, sigma = both.encode(PROMPTS), noise(both, 2), torch.full((2,), 0.8)
    with torch.no_grad():
        few = both.velocity(both.student_base, x, sigma, cond)
        assert torch.equal(few, klein.velocity(klein.teacher_base, x, sigma, cond))
    roles = copy_roles(both, seed=0)
    assert torch.equal(roles.generator.parameters[weight], klein.teacher_base.x_embedder.weight)
    assert torch.equal(roles.fake_score.parameters[weight], base.teacher_base.x_embedder.weight)


@pytest.mark.parametrize("name", ["sd3m", "flux_dev", "klein_base"])
def test_new_copy_is_separate_trainable_and_fp32(tiny_pipeline: Tiny, name: str) -> None:
    backbone = load(tiny_pipeline(name), dtype=torch.bfloat16)
    cond, x, sigma = backbone.encode(PROMPTS), noise(backbone, 2), torch.full((2,), 0.8)
    copy = backbone.new_copy("teacher", 0)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in copy.parameters())
    v = backbone.velocity(copy, x, sigma, cond)
    v.square().mean().backward()
    assert all(p.grad is None for p in backbone.teacher_base.parameters())
    with torch.no_grad():
        rounded = backbone.velocity(backbone.teacher_base, x, sigma, cond)
    assert 0 < (v - rounded).norm() / v.norm() < 0.06
    with pytest.raises(ValueError, match="not of 'fake'"):
        backbone.new_copy("fake", 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd35m", "flux_dev", "flux_schnell", "klein_base"])
def test_bf16(tiny_pipeline: Tiny, name: str) -> None:
    exact = shared(tiny_pipeline(name))
    rough = load(tiny_pipeline(name), dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert next(rough.teacher_base.parameters()).dtype == torch.bfloat16
    assert next(rough.vae.parameters()).dtype == torch.float32
    x, sigma = noise(exact, 2), torch.tensor([0.9, 0.4])
    cond, rough_cond = exact.encode(PROMPTS), rough.encode(PROMPTS)
    assert rough_cond.positive["prompt_embeds"].dtype == torch.bfloat16
    for guidance in (1.0, 2.0):
        v = exact.velocity(exact.teacher_base, x, sigma, cond, guidance)
        near = rough.velocity(rough.teacher_base, x, sigma, rough_cond, guidance)
        assert near.dtype == torch.float32
        assert (v - near).norm() / v.norm() < 0.05
    assert torch.equal(exact.decode(x), rough.decode(x))


@pytest.mark.parametrize("name", ["sd3m", "flux_dev", "klein_base"])
def test_decode_is_differentiable(tiny_pipeline: Tiny, name: str) -> None:
    """The gradient's slope along itself against finite differences."""
    backbone = shared(tiny_pipeline(name))
    z = noise(backbone, 1).requires_grad_()
    weights = torch.linspace(-1, 1, 3 * RESOLUTION**2).view(1, 3, RESOLUTION, RESOLUTION)

    def value(latents: Tensor) -> Tensor:
        return (weights * backbone.decode(latents)).sum()

    (gradient,) = torch.autograd.grad(value(z), z)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(z + 0.02 * direction) - value(z - 0.02 * direction)) / 0.04
    assert gradient.norm() > 1e-2
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.03)
    images = backbone.decode(100 * z.detach())
    assert images.min() >= 0 and images.max() <= 1


def with_adapters(path: Path, checkpointing: bool = False, **options: Any) -> tuple[Any, Any]:
    backbone = load(path, **options)
    settings = AdapterSettings(2, 4.0, backbone.lora_targets())
    roles = adapter_roles(backbone, settings, seed=0, checkpointing=checkpointing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for role in (roles.generator, roles.fake_score, roles.ema):
            for parameter in role.parameters.values():
                parameter.data.normal_(std=0.1)
    return backbone, roles


def arguments(backbone: Any) -> tuple[Tensor, Tensor, Any]:
    return noise(backbone, 2), torch.tensor([0.9, 0.4]), backbone.encode(PROMPTS)


ADAPTED = [*((name, None) for name in BUILDERS), ("klein_base", "klein")]


@pytest.mark.parametrize(("name", "generator"), ADAPTED)
def test_adapters_leave_the_teacher_and_train_the_generator_alone(
    tiny_pipeline: Tiny, name: str, generator: str | None
) -> None:
    options = {"generator_path": tiny_pipeline(generator)} if generator else {}
    backbone = load(tiny_pipeline(name), **options) if options else shared(tiny_pipeline(name))
    given = arguments(backbone)
    guidance = backbone.guidance
    with torch.no_grad():
        untouched = backbone.velocity(backbone.teacher_base, *given, guidance)
    backbone, roles = with_adapters(tiny_pipeline(name), **options)
    v = roles.generator(*given)
    with torch.no_grad():
        teacher, fake = roles.teacher(*given, guidance), roles.fake_score(*given)
    assert torch.equal(teacher, untouched)
    assert (v - fake).abs().max() > 1e-3 and (fake - roles.teacher(*given)).abs().max() > 1e-3
    v.square().mean().backward()  # other adapters were active since its graph was built
    mine = {id(p) for p in roles.generator.parameters.values()}
    for base in (backbone.student_base, backbone.teacher_base):
        for parameter in base.parameters():
            if id(parameter) not in mine:
                assert parameter.grad is None
    # SD3 drops the text stream's output of its last block, so nothing reaches its query there
    last = "transformer_blocks.2.attn.add_q_proj.lora_{}.weight"
    dropped = {last.format(side) for side in "AB"} if backbone.family == "sd3" else set()
    assert {n for n, p in roles.generator.parameters.items() if not p.grad.any()} == dropped


@pytest.mark.parametrize("name", ["sd35m", "flux_dev", "klein_base"])
def test_checkpointing_changes_no_gradient(tiny_pipeline: Tiny, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone, roles = with_adapters(tiny_pipeline(name), checkpointing)
        given = arguments(backbone)
        v = roles.generator(*given)
        with torch.no_grad():
            roles.teacher(*given)
        v.square().mean().backward()
        gradients.append([p.grad for p in roles.generator.parameters.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-8)


def adapted_modules(network: torch.nn.Module) -> set[str]:
    return {name.split(".lora_A")[0] for name, _ in network.named_parameters() if "lora_A" in name}


def test_lora_targets(tiny_pipeline: Tiny) -> None:
    """METHOD §6: the attention projections of both streams, and klein's fused ones."""
    stream = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    double = {f"transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in [*stream, "to_add_out"]}
    found = {
        name: adapted_modules(with_adapters(tiny_pipeline(name))[0].teacher_base)
        for name in ("sd35m", "flux_dev", "klein_base")
    }
    last = {f"transformer_blocks.2.attn.{name}" for name in stream}
    assert found["sd35m"] == double | last
    single = "single_transformer_blocks.{}.attn.{}"
    parts = {single.format(i, n) for i in (0, 1) for n in ("to_q", "to_k", "to_v")}
    assert found["flux_dev"] == double | parts
    fused = {single.format(i, n) for i in (0, 1) for n in ("to_qkv_mlp_proj", "to_out")}
    assert found["klein_base"] == double | fused


def test_tiny_pipelines_are_alike_for_a_seed(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    first = tiny_pipeline("klein")
    second, third = (build("klein", tmp_path / str(seed), seed) for seed in (0, 1))
    weights = [file.relative_to(first) for file in sorted(first.rglob("*.safetensors"))]
    assert len(weights) == 3
    for file in weights:
        assert (first / file).read_bytes() == (second / file).read_bytes()
        assert (first / file).read_bytes() != (third / file).read_bytes()
