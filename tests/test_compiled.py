"""`model.compile`: regional compilation under switched adapters and gradient checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families_table import CASES
from tiny_pipelines import build
from torch import nn
from torch._dynamo.utils import counters

from tiltflow.config.load import load_config
from tiltflow.core.distributed import Ranks, shard
from tiltflow.models.backbone import Conditioning
from tiltflow.models.compiled import VARIANTS, compile_blocks
from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.roles import AdapterSettings, Roles, adapter_roles

BACKEND = "aot_eager"  # all but the generated code, which takes minutes to build on a CPU
BOTH = ("generator", "fake_score")
SETTINGS = AdapterSettings(4, 8.0, ["attn.to_q", "attn.to_v", "attn.to_out.0"])


def arguments_of(backbone: PipelineBackbone) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0.9, 0.4]), backbone.encode(["a", "b"])


def gradients(roles: Roles, x: torch.Tensor, sigma: torch.Tensor, cond) -> dict:
    """Two graphs under two roles, a third role runs between, then both are differentiated."""
    first, second = roles.generator(x, sigma, cond), roles.fake_score(x, sigma, cond)
    with torch.no_grad():
        third = roles.teacher(x, sigma, cond, 3.0)
    first.square().sum().backward()
    second.square().sum().backward()
    values = {"generator": first.detach(), "fake_score": second.detach(), "teacher": third}
    for name in ("generator", "fake_score"):
        for key, parameter in getattr(roles, name).parameters.items():
            given = parameter.grad  # none where nothing reads the module's result
            values[f"{name}/{key}"] = torch.zeros_like(parameter) if given is None else given
    return values


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("sd35m", ()), *((case.names[0], BOTH) for case in CASES.values())],
)
def test_compiled_blocks_give_the_same_gradients(
    name: str, checkpointing: tuple[str, ...], tmp_path: Path
) -> None:
    path = build(name, tmp_path / name)
    plain = load_backbone(path, device="cpu", resolution=64, max_sequence_length=64)
    settings, found = AdapterSettings(2, 4.0, plain.lora_targets()), []
    for compiled in (False, True):
        backbone = copy.deepcopy(plain)
        roles = adapter_roles(backbone, settings, seed=0, checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for role in (roles.generator, roles.fake_score):
                for parameter in role.parameters.values():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if compiled:
            assert compile_blocks(backbone.student_base, BACKEND, backbone.record.blocks) > 0
        found.append(gradients(roles, *arguments_of(backbone)))
    assert all(found[0][name].abs().max() > 0 for name in (*BOTH, "teacher"))
    assert sum(bool(value.any()) for value in found[0].values()) > 0.9 * len(found[0])
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
def test_roles_with_as_many_adapters_share_a_compilation(tmp_path: Path) -> None:
    """Which names are active must not be part of what is compiled; past the limit torch raises."""
    config = torch._dynamo.config
    before = config.recompile_limit
    backbone = load_backbone(
        build("sd35m", tmp_path / "sd35m"), device="cpu", max_sequence_length=8
    )
    roles = adapter_roles(backbone, SETTINGS, seed=0, boundaries=4)
    compile_blocks(backbone.student_base, BACKEND, backbone.record.blocks)
    assert config.recompile_limit == before + VARIANTS and config.fail_on_recompile_limit_hit
    torch._dynamo.reset()
    x, sigma, cond = arguments_of(backbone)

    def made() -> int:
        return int(counters["stats"]["unique_graphs"])

    for role in (roles.generator, roles.fake_score.at(1)):
        role(x, sigma, cond).sum().backward()
        with torch.no_grad():
            role(x, sigma, cond)
    before = made()
    assert before > 0
    for role in roles.fake_score.boundaries[1:]:
        role(x, sigma, cond).sum().backward()
        with torch.no_grad():
            role(x, sigma, cond)
    assert made() == before


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["sd35m", "flux_dev"])
def test_blocks_that_ranks_share_are_compiled(name: str, tmp_path: Path) -> None:
    """`fully_shard` makes each a class of its own name."""
    given = {"device": "cpu", "resolution": 64, "max_sequence_length": 64}
    plain = load_backbone(build(name, tmp_path / name), **given)  # type: ignore[arg-type]
    x, sigma, cond = arguments_of(plain)
    expected = plain.velocity(plain.student_base, x, sigma, cond)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        shard(plain.student_base, plain.device, Ranks())
        count = compile_blocks(plain.student_base, BACKEND, plain.record.blocks)
        assert count == sum(
            len(m) for m in plain.student_base.children() if type(m) is nn.ModuleList
        )
        with torch.no_grad():
            made = plain.velocity(plain.student_base, x, sigma, cond)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
def test_a_kept_graph_of_compiled_blocks_is_gone_back_through_twice() -> None:
    """As `tilt.keep_graph` does where two terms of the loss look at one step."""
    network = nn.Sequential(Block(), Block())
    x, found = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), []
    for compiled in (False, True):
        if compiled:
            assert compile_blocks(network, BACKEND, ["Block"], again=True) == 2
            network(x[0])  # of two sizes any may come, as of a batch, and it is compiled for all
        network.zero_grad()
        y = network(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_a_network_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear has no repeated blocks to compile"):
        compile_blocks(nn.Linear(2, 2))


def test_the_mixture_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"model\.compile is for pipelines"):
        load_config("mixture_cold_start", ["model.compile=true", "run.out=x"])
