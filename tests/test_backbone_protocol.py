"""What a backbone promises beyond its pipeline's call: conditioning, velocity, decoding."""

from __future__ import annotations

import pytest
import torch
from backbone_helpers import PROMPTS, Tiny, load, noise, shared
from tiny_pipelines import BUILDERS, RESOLUTION, TOKENS
from torch import Tensor

from tiltflow.setup.tally import Tally


@pytest.mark.parametrize("name", BUILDERS)
def test_encode(tiny_pipeline: Tiny, name: str) -> None:
    backbone = load(tiny_pipeline(name))
    cond, again = backbone.encode(PROMPTS), backbone.encode(["", PROMPTS[1]])
    assert len(cond) == 2 and set(cond.positive) == set(cond.negative)
    clip = 16 if backbone.family == "sd3" else 0
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

    def v(guidance: float | None) -> Tensor:
        return backbone.velocity(backbone.teacher_base, x, sigma, cond, guidance)

    assert backbone.guidance == backbone.embedded_guidance == 3.5
    assert torch.equal(v(None), v(3.5))
    other = v(2.0)
    assert (other - v(None)).abs().max() > 1e-4
    assert (v(1.0) - v(None)).abs().max() > 1e-4 and not torch.equal(v(1.0), other)
    backbone.embedded_guidance = 2.0
    assert torch.equal(v(None), other)


def test_distilled_klein_refuses_guidance(tiny_pipeline: Tiny) -> None:
    backbone = shared(tiny_pipeline("klein"))
    cond = backbone.encode(PROMPTS[:1])
    with pytest.raises(ValueError, match="step-distilled and takes guidance 1"):
        backbone.velocity(backbone.teacher_base, noise(backbone, 1), torch.ones(1), cond, 4.0)


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


@pytest.mark.parametrize("name", ["sd3m", "flux_dev", "klein_base"])
def test_a_checkpointed_decoder_gives_the_same_gradient_and_keeps_less(
    tiny_pipeline: Tiny, name: str
) -> None:
    backbone = load(tiny_pipeline(name))
    z = noise(backbone, 2).requires_grad_()
    found, kept = [], []
    for checkpointed in (False, True):
        if checkpointed:
            backbone.checkpoint_decoder()
        with Tally(*backbone.vae.parameters(), z) as tally:
            images = backbone.decode(z)
            kept.append(tally.live)
            (gradient,) = torch.autograd.grad(images.square().sum(), z)
        found.append(gradient)
    assert torch.equal(*found)
    assert kept[1] < 0.7 * kept[0]
