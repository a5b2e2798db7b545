"""Products of a frozen fp32 base on a CPU, by oneDNN."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiltflow.config.load import load_config
from tiltflow.models.low_rank import FusedLinear
from tiltflow.models.pipelines import products
from tiltflow.models.pipelines.products import FrozenLinear, available, take_onednn
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.setup.build import build_backbone, build_stage

Tiny = Callable[[str], Path]
onednn = pytest.mark.skipif(not available(), reason="no AVX-512, or torch without oneDNN")


def layers(bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 8, bias=bias))
    plain.requires_grad_(False)
    taken = copy.deepcopy(plain)
    assert take_onednn(taken) == 2 and take_onednn(taken) == 0
    return plain, taken


def through(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = network(leaf)
    (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@onednn
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_torchs_to_fp32_rounding(bias: bool) -> None:
    plain, taken = layers(bias)
    random = torch.Generator().manual_seed(1)
    wide = torch.randn(3, 9, 24, generator=random)
    for x in (wide, wide[:, 2:7], wide[0]):  # whole, a slice of tokens, rows
        exact = through(copy.deepcopy(plain).double(), x.double())
        for found, other, true in zip(through(taken, x), through(plain, x), exact, strict=True):
            far, near = (float((made - true).norm() / true.norm()) for made in (found, other))
            assert far < 2 * near + 1e-7 and far < 1e-6
        with torch.no_grad():
            without = taken(x)
        assert torch.equal(without, through(taken, x)[0])


@onednn
def test_what_is_not_frozen_fp32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are trained, another type, autocast: torch's own product, and its bits."""
    plain, taken = layers()

    def never(*_: object) -> Tensor:
        raise AssertionError("by oneDNN")

    monkeypatch.setattr(products, "_product", never)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(taken(x), plain(x))
    halves = [copy.deepcopy(network).bfloat16() for network in (taken, plain)]
    assert torch.equal(*(network(x.bfloat16()) for network in halves))
    trained = [copy.deepcopy(network).requires_grad_() for network in (taken, plain)]
    assert torch.equal(*(network(x) for network in trained))
    with pytest.raises(AssertionError, match="by oneDNN"):
        taken(x)
    assert take_onednn(copy.deepcopy(plain).bfloat16()) == 0


@onednn
@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", "lora"), ("bf16", "lora"), ("fp32", "copies")]
)
def test_training_takes_it_for_a_frozen_fp32_base(
    tiny_pipeline: Tiny, tmp_path: Path, dtype: str, kind: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    values = [
        f"model.path={tiny_pipeline('sd35m')}", "model.resolution=64",
        "model.max_sequence_length=24", f"model.dtype={dtype}", f"adapters.kind={kind}",
        "model.gradient_checkpointing=false", "train.batch_size=2", "train.micro_batch_size=2",
        f"data.prompts={tmp_path / 'prompts.txt'}", "data.cache=off", "run.device=cpu",
        f"run.out={tmp_path / 'run'}", "cold_start.generator_every=1",
        *(["adapters.rank=4"] if kind == "lora" else ["adapters.init_std=null"]),
    ]  # fmt: skip
    cfg = load_config("sd35m_cold_start", values)
    if dtype == "bf16" or kind == "copies":
        base = build_backbone(cfg, "image").teacher_base
        assert not any(isinstance(module, FrozenLinear) for module in base.modules())
        return
    build = build_stage(cfg)
    kinds = [type(module) for module in build.backbone.teacher_base.modules()]
    assert (
        FrozenLinear in kinds and FusedLinear in kinds and nn.Linear not in _bases(build.backbone)
    )
    build.stage.iteration(0)
    assert not build.stage.guard.failures()


@onednn
def test_a_clip_that_scores_takes_it() -> None:
    model = CLIPScore("packaged:clip").model
    kinds = {type(module) for module in model.modules()}
    assert FrozenLinear in kinds and nn.Linear not in kinds


def _bases(backbone: object) -> set[type]:
    """The classes of the layers under adapters."""
    network = backbone.teacher_base  # type: ignore[attr-defined]
    return {type(m.base_layer) for m in network.modules() if isinstance(m, FusedLinear)}
