"""A base kept in 8 bits against the same base rounded to them once and kept in full."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import PROMPTS, Tiny, load, noise
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from safetensors.torch import load_file, save_file
from test_families_training import recipe
from torch import nn

from tiltflow.config.load import load_config
from tiltflow.models.pipelines.storage import FP8, LOST
from tiltflow.models.roles import AdapterSettings, Roles, adapter_roles
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.train import train_run


def rounded(network: nn.Module) -> None:
    """Every matrix outside norms to 8 bits and back, by hand, but for what the class leaves out."""
    left: Any = (*DEFAULT_SKIP_MODULES_PATTERN, *(network._skip_layerwise_casting_patterns or ()))  # type: ignore[misc]
    for name, module in network.named_modules():
        skipped = any(re.search(pattern, name) for pattern in left)
        if isinstance(module, nn.Linear | nn.Conv2d) and not skipped:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(FP8).to(parameter.dtype)


def made(tiny: Tiny, name: str, generator: str | None, fp8: bool) -> tuple[Any, Roles]:
    options = {"generator_path": tiny(generator)} if generator else {}
    backbone = load(tiny(name), dtype=torch.bfloat16, fp8=fp8, **options)
    if not fp8:
        for base in {backbone.student_base, backbone.teacher_base}:
            rounded(base)
    settings = AdapterSettings(2, 4.0, backbone.lora_targets())
    roles = adapter_roles(backbone, settings, seed=0, checkpointing=("generator", "fake_score"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for role in (roles.generator, roles.fake_score):
            for parameter in role.parameters.values():
                assert parameter.dtype == torch.float32
                parameter.data.normal_(std=0.1)
    return backbone, roles


@pytest.mark.parametrize(
    ("name", "generator"),
    [
        ("sd35m", None),
        ("flux_dev", None),
        ("klein_base", "klein"),
        ("krea2", "krea2_turbo"),
        ("qwen_image_21", None),
    ],
)
def test_roles_and_gradients_are_those_of_the_rounded_base(
    tiny_pipeline: Tiny, name: str, generator: str | None
) -> None:
    found: list[list[torch.Tensor | None]] = []
    for fp8 in (False, True):
        backbone, roles = made(tiny_pipeline, name, generator, fp8)
        bases = {backbone.student_base, backbone.teacher_base}
        kept = [p for base in bases for p in base.parameters() if p.dtype == FP8]
        before = [p.view(torch.uint8).clone() for p in kept]
        cond, x, sigma = backbone.encode(PROMPTS), noise(backbone, 2), torch.tensor([0.9, 0.4])
        v, fake = roles.generator(x, sigma, cond), roles.fake_score(x, sigma, cond)
        with torch.no_grad():
            teacher = roles.teacher(x, sigma, cond, backbone.guidance)
        (v.square().mean() + fake.square().mean()).backward()
        every = [*roles.generator.parameters.values(), *roles.fake_score.parameters.values()]
        found.append([teacher, v.detach(), fake.detach(), *(p.grad for p in every)])
        after = [p for base in bases for p in base.parameters() if p.dtype == FP8]
        assert len(after) == len(before) and (len(before) > 10) == fp8
        assert all(torch.equal(a.view(torch.uint8), b) for a, b in zip(after, before, strict=True))
    for plain, small in zip(*found, strict=True):
        assert (plain is None) == (small is None)
        assert plain is None or torch.equal(plain, small)
    assert sum(bool(g.any()) for g in found[1][3:] if g is not None) > 10


def test_what_8_bits_take(tiny_pipeline: Tiny) -> None:
    """A byte a number in the matrices; norms, and what conditions them, stay in bf16."""
    backbone, _ = made(tiny_pipeline, "flux_dev", None, True)
    for name, parameter in backbone.student_base.named_parameters():
        if ".lora_" not in name:
            expected = torch.bfloat16 if "norm" in name or "proj_out" in name[:8] else FP8
            assert parameter.dtype == expected, name


@pytest.mark.long
def test_what_is_too_small_for_8_bits_is_said(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """Scales before a norm of queries and keys say nothing of what a network computes, and with
    them all of a matrix may lie where 8 bits have a few steps, or none."""
    model = shutil.copytree(tiny_pipeline("sd35m"), tmp_path / "model")
    assert load(model, dtype=torch.bfloat16, fp8=True).lost == {}
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    small = {
        "transformer_blocks.0.attn.to_q.weight": 64,
        "transformer_blocks.1.attn.to_k.weight": 512,
    }
    expected = {}
    for name, by in small.items():
        weights[name] = weights[name] / by
        value = weights[name].bfloat16().double()
        expected[name] = float((value - value.to(FP8).double()).norm() / value.norm())
    save_file(weights, file, {"format": "pt"})
    lost = load(model, dtype=torch.bfloat16, fp8=True).lost
    assert lost == pytest.approx(expected, rel=1e-3) and min(lost.values()) > LOST
    assert load(model, dtype=torch.bfloat16).lost == {}

    said: list[str] = []
    callbacks = Callbacks()
    callbacks.notice = said.append  # type: ignore[method-assign]
    more = ["model.base_storage=fp8", "model.gradient_checkpointing=true", f"model.path={model}"]
    run = recipe("cold_start", "sd3", tiny_pipeline, tmp_path / "run", "train.steps=1", *more)
    train_run(run, callbacks)
    (line,) = [line for line in said if "base_storage" in line]
    assert line.startswith(
        "warning: model.base_storage=fp8 takes 100% of transformer_blocks.1.attn"
    )
    assert "to_k.weight and 1 more" in line


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("adapters.kind=copies", "for the frozen base of LoRAs"),
        ("run.sharding=fsdp2", "cannot be sharded"),
        ("model.compile=true", "model.compile true exclude each other"),
        ("model.gradient_checkpointing=false", "saves no memory unless"),
        ("model.base_storage=int4", "'fp8'"),
    ],
)
def test_what_does_not_go_with_it(override: str, sentence: str) -> None:
    given = ["data.prompts=x", "model.base_storage=fp8"]
    assert load_config("sd35m_cold_start", given).model.base_storage == "fp8"
    with pytest.raises(ValueError, match=sentence):
        load_config("sd35m_cold_start", [*given, override])
    with pytest.raises(ValueError, match="not for the mixture"):
        load_config("mixture_cold_start", ["model.base_storage=fp8"])
