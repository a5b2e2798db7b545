"""Adapters and copies on each family's networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import PROMPTS, Tiny, load, noise, shared
from tiny_pipelines import BUILDERS
from torch import Tensor

from tiltflow.models.roles import AdapterSettings, adapter_roles, copy_roles


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


def with_adapters(
    path: Path, checkpointing: tuple[str, ...] = (), **options: Any
) -> tuple[Any, Any]:
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
    for checkpointing in ((), ("generator",)):
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


@pytest.mark.parametrize("parts", [(), ("generator",), ("fake_score",), ("generator", "decoder")])
def test_checkpointing_recomputes_the_roles_that_are_named(
    tiny_pipeline: Tiny, parts: tuple[str, ...]
) -> None:
    backbone, roles = with_adapters(tiny_pipeline("sd35m"), parts)
    ran = []
    block = backbone.teacher_base.transformer_blocks[0]
    # a recomputation may end before the block does
    block.register_forward_pre_hook(lambda *_: ran.append(None))
    given = arguments(backbone)
    for role in (roles.generator, roles.fake_score):
        ran.clear()
        role(*given).square().mean().backward()
        assert len(ran) == (2 if role.name in parts else 1), role.name
