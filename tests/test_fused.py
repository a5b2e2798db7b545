"""What training in 16 bits takes: fused blocks, adapters cast once a step, prepared switches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.models.backbone import Conditioning
from tiltflow.models.families import load_backbone
from tiltflow.models.low_rank import FusedLinear
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.fused import FusedBlock
from tiltflow.models.roles import AdapterSettings, Roles, adapter_roles
from tiltflow.setup.build import Build, build_stage
from tiltflow.training.optim import Updater

Tiny = Callable[[str], Path]
SETTINGS = AdapterSettings(4, 8.0, ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0"])


def backbone_of(path: Path, dtype: torch.dtype) -> PipelineBackbone:
    made = load_backbone(path, device="cpu", dtype=dtype, max_sequence_length=8, parts="image")
    assert isinstance(made, PipelineBackbone)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a fresh norm's weights are 1, and would hide a norm that is left out
        for name, parameter in made.transformer.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return made


def inputs(made: PipelineBackbone) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(3, *made.latent_shape, generator=random)
    cond = {
        key: torch.randn(3, *shape, generator=random)
        for key, shape in made.conditioning_shapes().items()
    }
    return x, torch.tensor([0.9, 0.5, 0.2]), cond


def far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["sd35m", "sd3m"])
def test_a_fused_transformer_is_diffusers_own_to_bf16_rounding(
    tiny_pipeline: Tiny, name: str, mixed: bool
) -> None:
    """Against fp32 it is as near as diffusers' own blocks in bf16 are, forwards and backwards; with
    bf16 weights, and under autocast over fp32 ones."""
    found = {}
    for kind in ("exact", "plain", "fused"):
        made = backbone_of(tiny_pipeline(name), torch.float32)
        narrow = torch.float32 if kind == "exact" or mixed else torch.bfloat16
        made.transformer.to(torch.bfloat16).to(narrow)
        if kind == "fused":
            assert made.fuse(mixed) == 3 and made.fuse(mixed) == 0
        x, sigma, cond = inputs(made)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed and kind != "exact"):
            v = made._forward(made.transformer, x, sigma, cond)
        v.square().sum().backward()
        assert x.grad is not None
        found[kind] = (v.detach(), x.grad)
    for i in range(2):
        plain, fused = (far(found[kind][i], found["exact"][i]) for kind in ("plain", "fused"))
        assert 0 < fused < 1.5 * plain + 1e-3 and plain < 0.05


def test_in_fp32_nothing_is_fused(tiny_pipeline: Tiny) -> None:
    made = backbone_of(tiny_pipeline("sd35m"), torch.float32)
    assert made.fuse() == 0
    assert not any(isinstance(module, FusedBlock) for module in made.transformer.modules())


def stage(tiny: Tiny, out: Path, *more: str) -> Build:
    """Stage 1 as the recipe of a real model has it: a bf16 base, fp32 adapters, no autocast."""
    (out / "prompts.txt").write_text("a cat\na dog\n")
    values = [
        f"model.path={tiny('sd35m')}", "model.resolution=64", "model.max_sequence_length=24",
        "train.batch_size=4", "train.micro_batch_size=2", f"data.prompts={out / 'prompts.txt'}",
        "data.cache=off", "run.device=cpu", f"run.out={out / 'run'}",
        "cold_start.generator_every=2",
    ]  # fmt: skip
    return build_stage(load_config("sd35m_cold_start", [*values, *more]))


@pytest.mark.long
@pytest.mark.parametrize("keep_graph", [False, True])
def test_the_recipe_takes_the_fast_path(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_graph: bool
) -> None:
    """No pass goes through PEFT's own layer, every block is a fused one, and after the first
    iterations no layer is prepared again."""
    kept = ["cold_start.keep_graph=true", "cold_start.fresh_boundary=false"]
    build = stage(tiny_pipeline, tmp_path, *(kept if keep_graph else []))
    blocks = [m for m in build.backbone.teacher_base.modules() if "Block" in type(m).__name__]
    assert blocks and all(isinstance(block, FusedBlock) for block in blocks)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pass through PEFT's own layer")

    monkeypatch.setattr(Linear, "forward", never)
    for step in range(2):
        build.stage.iteration(step)
    monkeypatch.setattr(FusedLinear, "active_parts", never)
    for step in range(2, 6):
        build.stage.iteration(step)
    assert not build.stage.guard.failures()


def roles_of(path: Path) -> Roles:
    made = backbone_of(path, torch.bfloat16)
    made.fuse()
    return adapter_roles(made, SETTINGS, seed=0, checkpointing=("generator", "fake_score"))


def called(roles: Roles, name: str) -> Tensor:
    role = getattr(roles, name)
    x, sigma, cond = inputs(role.backbone)
    out: Tensor = role(x, sigma, Conditioning(cond, cond))
    return out


def test_an_optimizer_step_an_average_and_loading_are_seen(
    tiny_pipeline: Tiny,
) -> None:
    """A role predicts what one does that was built anew with the same weights."""
    roles = roles_of(tiny_pipeline("sd35m"))
    updaters = {name: Updater(getattr(roles, name), 0.05) for name in ("generator", "fake_score")}
    for step in range(2):
        for name, updater in updaters.items():
            called(roles, name).square().sum().backward()
            updater.apply(step)
        roles.update_ema(0.5)
    fresh = roles_of(tiny_pipeline("sd35m"))
    before = {name: called(fresh, name).detach() for name in ("generator", "fake_score", "ema")}
    fresh.load(copy.deepcopy(roles.state()))
    for name, old in before.items():
        now, again = called(roles, name).detach(), called(fresh, name).detach()
        assert torch.equal(now, again) and not torch.equal(now, old)
