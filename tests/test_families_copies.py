"""Adapters switched in one network against separate networks, for every family and both stages.

Each role of the reference is a whole fp32 network of its own, with the products of its adapters in
its matrices, and the gradient of a matrix W is carried to A and B by the chain rule. So nothing of
it knows adapters: not PEFT's layers, not the switch between roles, not checkpointing under it, not
the stack of two stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families_table import CASES
from students import random_like
from test_families_training import recipe
from torch import Tensor

from tiltflow.config.load import RunConfig, read_prompts
from tiltflow.models.roles import Role, Roles, State, copy_roles
from tiltflow.setup.assemble import make_stages
from tiltflow.setup.build import adapter_settings, build_backbone, build_roles, encode_sets
from tiltflow.setup.starts import Start
from tiltflow.training.cold_start import ColdStart
from tiltflow.training.optim import Updater
from tiltflow.training.tilt import Tilt
from tiltflow.training.updates import Share

Tiny = Callable[[str], Path]
Table = dict[str, Tensor]
SCALING = 2.0
"""α / rank."""
MORE = {
    "both": ["model.gradient_checkpointing=true", "train.fake_scores=shared", "adapters.alpha=4.0"],
    "cold_start": ["cold_start.keep_graph=true"],
    "tilt": [
        "model.few_step=elsewhere", "tilt.kl=0.1", "tilt.policy_weight=1", "tilt.matching_weight=1",
        "tilt.reward_weight=1", "tilt.reward_steps=1",
    ],
}  # fmt: skip


def adapters(cfg: RunConfig) -> Roles:
    """The stage's roles as a run makes them, all with random weights; stage 2's lie on others."""
    backbone, start = build_backbone(cfg, "image"), None
    if cfg.stage == "tilt":
        first = build_roles(cfg.model_copy(update={"stage": "cold_start"}), backbone, None)
        below, fake = (
            random_like(role.state(), seed)
            for seed, role in enumerate((first.generator, first.fake_score))
        )
        start = Start(below, fake, adapter_settings(cfg, backbone))
        backbone = build_backbone(cfg, "image")  # one without adapters
    roles = build_roles(cfg, backbone, start)
    for seed, role in enumerate((roles.generator, roles.fake_score), 2):
        role.load(random_like(role.state(), seed))
    return roles


def whole(role: Role) -> State:
    """All weights of a role's network, its active adapters' products added to what is below."""
    found: State = {}
    for name, parameter in role.network.named_parameters():
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = parameter.detach().float().clone()
    for name, layer in role.network.named_modules():
        for adapter in role.adapters if hasattr(layer, "lora_A") else ():
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            product = layer.scaling[adapter] * up.double() @ down.double()
            found[f"{name}.weight"] += product.detach().float()
    return found


def copies(cfg: RunConfig, of: Roles) -> Roles:
    """The same networks, each by itself."""
    backbone = build_backbone(cfg, "image")
    below = whole(of.reference) if of.reference is not None else None
    roles = copy_roles(backbone, seed=0, few_step=below)
    for role, same in ((roles.generator, of.generator), (roles.fake_score, of.fake_score)):
        role.load(whole(same))
    return roles


def iterations(stage: ColdStart | Tilt) -> None:
    """Three of stage 1; of stage 2 one with each term of the loss alone, and one with all."""
    if isinstance(stage, ColdStart):
        for step in range(3):
            stage.iteration(step)
        return
    for step, terms in enumerate([*((term,) for term in stage.terms), stage.terms]):
        replace(stage, terms=terms).iteration(step)


def gradients(role: Role) -> Table:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in role.parameters.items()
    }


def by_adapters(
    stage: ColdStart | Tilt, patch: pytest.MonkeyPatch
) -> list[tuple[Role, Table, Table, State]]:
    """Each update of a run: whose, its A and B, their gradients, and its network afterwards."""
    seen, step = [], Updater.apply

    def apply(updater: Updater, number: int) -> Tensor:
        role = updater.role
        before = {name: value.clone() for name, value in role.state().items()}
        found = gradients(role)
        norm = step(updater, number)
        seen.append((role, before, found, whole(role)))
        return norm

    patch.setattr(Updater, "apply", apply)
    iterations(stage)
    patch.undo()
    return seen


def by_copies(
    stage: ColdStart | Tilt, after: list[State], patch: pytest.MonkeyPatch
) -> list[Table]:
    """The gradients of the same updates; each network then gets the weights of `after`."""
    seen: list[Table] = []

    def apply(updater: Updater, number: int) -> Tensor:
        seen.append(gradients(updater.role))
        updater.role.load(after[len(seen) - 1])
        updater.drop()
        return torch.zeros(())

    patch.setattr(Updater, "apply", apply)
    iterations(stage)
    patch.undo()
    return seen


def carried(weights: Table, of: Table) -> Table:
    """∂/∂A = s Bᵀ ∂/∂W and ∂/∂B = s ∂/∂W Aᵀ, for W + s B A."""
    made = {}
    for name in weights:
        module, _, which = name.rpartition(".lora_")
        gradient = SCALING * of[f"{module}.weight"]
        down, up = (weights[f"{module}.lora_{one}.weight"] for one in "AB")
        made[name] = up.t() @ gradient if which.startswith("A") else gradient @ down.t()
    return made


@pytest.mark.parametrize(
    ("family", "stage"),
    [
        ("sd3", "cold_start"),
        ("sd3", "tilt"),
        # what a family has of its own is in both stages' passes
        *(pytest.param(f, "tilt", marks=pytest.mark.long) for f in CASES if f != "sd3"),
    ],
)
def test_gradients_are_those_of_separate_networks(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, stage: str
) -> None:
    cfg = recipe(stage, family, tiny_pipeline, tmp_path / "run", *MORE["both"], *MORE[stage])
    assert cfg.adapters.alpha / cfg.adapters.rank == SCALING
    (encoded,) = encode_sets(cfg, [read_prompts(cfg).train])
    one = adapters(cfg)
    other, share = copies(cfg, one), Share(4, 2)
    stages = [
        make_stages(cfg, roles.generator.backbone, encoded, roles, share)[0]
        for roles in (one, other)
    ]
    expected = by_adapters(stages[0], monkeypatch)
    found = by_copies(stages[1], [after for *_, after in expected], monkeypatch)
    assert len(found) == len(expected) >= 6
    for (role, weights, gradient, _), theirs in zip(expected, found, strict=True):
        same = carried(weights, theirs)
        largest = max(value.norm() for value in same.values())
        assert largest > 0
        for name, value in same.items():
            off = (gradient[name] - value).norm()
            assert off <= 3e-4 * value.norm() + 1e-6 * largest, (role.name, name, off / largest)
