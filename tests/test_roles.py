"""Adapters over one base against untouched bases and separate copies (DESIGN §2)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_pipelines import build

from tiltflow.method.rollout import attach, rollout
from tiltflow.models.backbone import Backbone
from tiltflow.models.families import load_backbone
from tiltflow.models.families.mixture import MixtureBackbone
from tiltflow.models.roles import AdapterSettings, Roles, adapter_roles, copy_roles

SETTINGS = AdapterSettings(4, 8.0, ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sd35m", tmp_path_factory.mktemp("pipelines") / "sd35m")


@pytest.fixture
def backbone(pipeline: Path) -> Backbone:
    return load_backbone(pipeline, device="cpu", max_sequence_length=8)


def inputs(backbone: Backbone, n: int = 2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *backbone.latent_shape, generator=generator)
    return x, torch.linspace(0.9, 0.4, n), backbone.encode(["a", "b"][:n])


def shake(roles: Roles, seed: int = 1) -> None:
    """Random B matrices, so that adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role in (roles.generator, roles.fake_score, roles.ema):
            for name, parameter in role.parameters.items():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def stacked(backbone: Backbone) -> Roles:
    """Stage-2 roles on a random stage-1 adapter."""
    donor = adapter_roles(copy.deepcopy(backbone), SETTINGS, seed=3)
    shake(donor, 7)
    few_step = {k: v.clone() for k, v in donor.generator.state().items()}
    return adapter_roles(backbone, SETTINGS, seed=4, few_step=(SETTINGS, few_step))


def test_teacher_is_bit_equal_to_the_untouched_base(pipeline: Path, backbone: Backbone) -> None:
    x, sigma, cond = inputs(backbone)
    with torch.no_grad():
        before = backbone.velocity(backbone.teacher_base, x, sigma, cond, 3.0)
        roles = adapter_roles(backbone, SETTINGS, seed=0)
        shake(roles)
        roles.generator(x, sigma, cond)
        assert torch.equal(roles.teacher(x, sigma, cond, 3.0), before)
        assert not torch.equal(roles.generator(x, sigma, cond, 3.0), before)


def test_fresh_adapters_do_nothing_and_share_names(backbone: Backbone) -> None:
    x, sigma, cond = inputs(backbone)
    roles = adapter_roles(backbone, SETTINGS, seed=0)
    with torch.no_grad():
        base = roles.teacher(x, sigma, cond)
        for role in (roles.generator, roles.fake_score, roles.ema):
            assert torch.equal(role(x, sigma, cond), base)
    assert list(roles.generator.parameters) == list(roles.ema.parameters)
    assert all(p.dtype == torch.float32 for p in roles.generator.parameters.values())


def test_same_seed_same_adapter(pipeline: Path) -> None:
    made = [
        adapter_roles(load_backbone(pipeline, device="cpu"), SETTINGS, seed=s).generator.state()
        for s in (0, 0, 1)
    ]
    name = next(n for n in made[0] if "lora_A" in n)
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])


def test_adapters_start_apart(backbone: Backbone) -> None:
    """Stage 2's lies on stage 1's of the same seed: of one draw, both would read the same."""
    first = adapter_roles(copy.deepcopy(backbone), SETTINGS, seed=4)
    few_step = {k: v.clone() for k, v in first.generator.state().items()}
    fake = {k: v.clone() for k, v in first.fake_score.state().items()}
    second = adapter_roles(
        backbone,
        SETTINGS,
        seed=4,
        few_step=(SETTINGS, few_step),
        fake_score=fake,
        fresh_fake_score=True,
    )
    roles = (first.generator, first.fake_score, second.generator, second.fake_score)
    for name in (n for n in few_step if "lora_A" in n):
        drawn = torch.stack([role.state()[name].flatten() for role in roles])
        assert (drawn @ drawn.T / drawn.square().sum(1) - torch.eye(4)).abs().max() < 0.5, name
        assert len({tuple(row.tolist()) for row in drawn}) == 4
    assert all(torch.equal(w, second.generator.state()[n]) for n, w in second.ema.state().items())


@pytest.mark.parametrize(
    "checkpointing", [(), ("generator",), ("fake_score",), ("generator", "fake_score")]
)
def test_gradients_under_switched_adapters_equal_separate_copies(
    backbone: Backbone, checkpointing: tuple[str, ...]
) -> None:
    """Two graphs are built under two roles, a third role runs, then both are differentiated."""
    x, sigma, cond = inputs(backbone)
    reference = {}
    for name in ("generator", "fake_score"):
        alone = adapter_roles(copy.deepcopy(backbone), SETTINGS, seed=0)
        shake(alone)
        role = getattr(alone, name)
        role(x, sigma, cond).square().sum().backward()
        reference[name] = {k: p.grad.clone() for k, p in role.parameters.items()}
    roles = adapter_roles(backbone, SETTINGS, seed=0, checkpointing=checkpointing)
    shake(roles)
    first = roles.generator(x, sigma, cond)
    second = roles.fake_score(x, sigma, cond)
    with torch.no_grad():
        roles.teacher(x, sigma, cond)
    first.square().sum().backward()
    second.square().sum().backward()
    for name, expected in reference.items():
        for key, parameter in getattr(roles, name).parameters.items():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected[key]), (name, key)
    assert all(p.grad is None for p in roles.ema.parameters.values())
    assert all(
        p.grad is None for n, p in backbone.student_base.named_parameters() if "lora_" not in n
    )


def test_stage_two_stacks_on_a_frozen_stage_one(backbone: Backbone) -> None:
    x, sigma, cond = inputs(backbone)
    roles = stacked(backbone)
    assert roles.reference is not None
    with torch.no_grad():
        stage_one = roles.reference(x, sigma, cond)
        assert torch.equal(roles.generator(x, sigma, cond), stage_one)
        assert not torch.equal(roles.teacher(x, sigma, cond), stage_one)
    shake(roles)
    roles.generator(x, sigma, cond).sum().backward()
    trained = {n for n, p in backbone.student_base.named_parameters() if p.grad is not None}
    assert trained and all(".generator." in name for name in trained)
    with torch.no_grad():
        assert torch.equal(roles.reference(x, sigma, cond), stage_one)
    assert "few_step" in roles.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strength_may_be_set_again(pipeline: Path, dtype: torch.dtype) -> None:
    """After use, up and down, exact each time: as if it had been the first."""
    backbone = load_backbone(pipeline, device="cpu", max_sequence_length=8, dtype=dtype)
    given = inputs(backbone)
    roles = stacked(backbone)
    shake(roles)
    switch = roles.generator.switch
    assert switch is not None and roles.reference is not None

    def at(strength: float) -> torch.Tensor:
        switch.scale("generator", strength)
        with torch.no_grad():
            return roles.generator(*given)

    with torch.no_grad():
        whole, nothing = roles.generator(*given), roles.reference(*given)
    half = at(0.5)
    assert not half.equal(whole) and not half.equal(nothing)
    assert at(1.0).equal(whole)
    assert at(0.5).equal(half)
    torch.testing.assert_close(at(0.0), nothing)
    with torch.no_grad():
        assert roles.reference(*given).equal(nothing)
        roles.generator.load({k: 0 * v for k, v in roles.generator.state().items()})
    torch.testing.assert_close(at(1.0), nothing)


def test_one_base_in_memory(backbone: Backbone) -> None:
    """Parameters = the base's once + what each adapter adds."""
    base = sum(p.numel() for p in backbone.student_base.parameters())
    roles = adapter_roles(backbone, SETTINGS, seed=0)
    adapters = sum(
        p.numel()
        for role in (roles.generator, roles.fake_score, roles.ema)
        for p in role.parameters.values()
    )
    assert sum(p.numel() for p in backbone.student_base.parameters()) == base + adapters
    assert roles.teacher.network is roles.generator.network is roles.fake_score.network


def test_ema(backbone: Backbone) -> None:
    roles = adapter_roles(backbone, SETTINGS, seed=0)
    before = {k: v.clone() for k, v in roles.ema.state().items()}
    shake(roles)
    roles.ema.load(before)
    roles.update_ema(0.9)
    for name, value in roles.ema.state().items():
        expected = 0.9 * before[name] + 0.1 * roles.generator.parameters[name].detach()
        torch.testing.assert_close(value, expected)


def test_loading_foreign_weights_is_refused(backbone: Backbone) -> None:
    roles = adapter_roles(backbone, SETTINGS, seed=0)
    state = dict(roles.generator.state())
    name, value = state.popitem()
    with pytest.raises(ValueError, match="do not match"):
        roles.generator.load(state)
    with pytest.raises(ValueError, match="in the weights to load"):
        roles.generator.load({**state, name: value[:1]})


def test_copies_are_trainable_fp32_and_start_from_the_base(backbone: Backbone) -> None:
    x, sigma, cond = inputs(backbone)
    roles = copy_roles(backbone, seed=0)
    with torch.no_grad():
        assert torch.equal(roles.generator(x, sigma, cond), roles.teacher(x, sigma, cond))
    roles.generator(x, sigma, cond).sum().backward()
    assert any(p.grad is not None for p in roles.generator.parameters.values())
    assert all(p.grad is None for p in roles.fake_score.parameters.values())
    assert all(p.grad is None for p in backbone.teacher_base.parameters())


def test_replayed_step_is_bit_equal_and_the_first_ratio_is_one(backbone: Backbone) -> None:
    roles = stacked(backbone)
    shake(roles)
    x, _, cond = inputs(backbone)
    noise = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(2))
    sigmas = backbone.few_step_sigmas(4)
    trajectory = rollout(
        roles.generator, x, sigmas, cond, 0.9, lambda k: noise[k], record=(0, 1, 2)
    )
    from tiltflow.method.rollout import log_prob

    for k in (0, 1, 2):
        x_next, mean, std = attach(roles.generator, trajectory, k)
        assert torch.equal(x_next.detach(), trajectory.states[k + 1])
        ratio = torch.exp(log_prob(trajectory.states[k + 1], mean, std) - trajectory.log_probs[k])
        assert bool((ratio == 1).all())


def test_mixture_roles_are_copies() -> None:
    backbone = MixtureBackbone(fit_steps=50)
    roles = copy_roles(backbone, seed=0)
    x, sigma = torch.randn(8, 2), torch.full((8,), 0.5)
    cond = backbone.encode([""] * 8)
    assert torch.equal(roles.generator(x, sigma, cond), roles.fake_score(x, sigma, cond))
    assert roles.generator.network is not roles.fake_score.network
