"""What the published recipes choose: adapters, the loss's weights, averages, guidance, GenEval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import build

from tiltflow.models.adapters import AdapterSettings
from tiltflow.models.families import load_backbone
from tiltflow.models.families.flux import FluxBackbone
from tiltflow.models.roles import Role, Roles, adapter_roles
from tiltflow.training.averaging import Averaging
from tiltflow.training.optim import Updater

SETTINGS = AdapterSettings(4, 8.0, ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sd35m", tmp_path_factory.mktemp("pipelines") / "sd35m")


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
@pytest.mark.parametrize("std", [None, 1.0])
def test_a_is_drawn_in_fp32_whatever_the_base_is_kept_in(
    pipeline: Path, storage: str, std: float | None
) -> None:
    def roles(**options: Any) -> Roles:
        backbone = load_backbone(pipeline, device="cpu", max_sequence_length=8, **options)
        settings = AdapterSettings(32, 64.0, ["attn.to_q", "attn.to_v"])
        return adapter_roles(backbone, settings, seed=0, init_std=std)

    here, plain = roles(dtype=torch.bfloat16, fp8=storage == "fp8"), roles()
    for role in (here.generator, here.fake_score, here.ema):
        drawn = torch.cat([p.flatten() for n, p in role.parameters.items() if ".lora_A." in n])
        assert drawn.dtype == torch.float32 and len(drawn.unique()) > 1000
        assert drawn.std().item() == pytest.approx(1 / 32 if std is None else std, rel=0.05)
    for name, value in plain.generator.parameters.items():  # the draws are an fp32 base's
        assert torch.equal(value, here.generator.parameters[name])


def test_std_1_moves_the_velocity_32_times_as_far_as_one_over_the_rank(pipeline: Path) -> None:
    """100 AdamW steps of 3e-6 along one loss; B's steps do not depend on A's size, W's do."""
    moved = []
    for std in (None, 1.0):
        backbone = load_backbone(pipeline, device="cpu", max_sequence_length=8)
        settings = AdapterSettings(32, 64.0, ["attn.to_q", "attn.to_k", "attn.to_v"])
        roles = adapter_roles(backbone, settings, seed=0, init_std=std)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *backbone.latent_shape, generator=generator)
        along = torch.randn(x.shape, generator=generator)
        given = x, torch.tensor([0.7]), backbone.encode(["a"])
        before = roles.generator(*given).detach()
        optimizer = torch.optim.AdamW(
            list(roles.generator.parameters.values()), lr=3e-6, weight_decay=1e-4
        )
        for _ in range(100):
            optimizer.zero_grad()
            (roles.generator(*given) * along).sum().backward()
            optimizer.step()
        moved.append((roles.generator(*given).detach() - before).norm().item())
    assert moved[1] / moved[0] == pytest.approx(32, abs=3)


@pytest.mark.parametrize("std", [1 / 32, 1.0])
def test_recorded_gradients_give_the_weights_of_a_plain_computation(std: float) -> None:
    """ΔW = (α/r) B A after 100 AdamW steps of 3e-6 in fp64, against the update rule by hand."""
    draw = torch.Generator().manual_seed(1)
    rank, scale, lr, decay, (b1, b2) = 32, 2.0, 3e-6, 1e-4, (0.9, 0.999)
    gradients = torch.randn(100, 24, 48, generator=draw, dtype=torch.float64)
    start = std * torch.randn(rank, 48, generator=draw, dtype=torch.float64)
    down = torch.nn.Parameter(start.clone())
    up = torch.nn.Parameter(torch.zeros(24, rank, dtype=torch.float64))
    layer: Any = torch.nn.Module()
    role = Role("generator", layer, layer, parameters={"A": down, "B": up})
    updater = Updater(role, lr, (b1, b2), decay, clip=1e9)
    plain = [start.clone(), torch.zeros(24, rank, dtype=torch.float64)]
    first, second = ([torch.zeros_like(p) for p in plain] for _ in range(2))
    for t, g in enumerate(gradients, 1):
        (scale * (up @ down) * g).sum().backward()
        updater.apply(t - 1)
        each = [scale * plain[1].T @ g, scale * g @ plain[0].T]
        for i, grad in enumerate(each):
            first[i] = b1 * first[i] + (1 - b1) * grad
            second[i] = b2 * second[i] + (1 - b2) * grad**2
            pace = (first[i] / (1 - b1**t)) / ((second[i] / (1 - b2**t)).sqrt() + 1e-8)
            plain[i] = plain[i] * (1 - lr * decay) - lr * pace
    ours, theirs = scale * (up @ down).detach(), scale * plain[1] @ plain[0]
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm() and theirs.norm() > 0


def merged(backbone: Any, base: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """W ← W + (α/r) B A in fp32, in a copy's own matrices."""
    scale = SETTINGS.alpha / SETTINGS.rank
    table = dict(base.named_parameters())
    for name, up in weights.items():
        if ".lora_B." in name:
            down = weights[name.replace(".lora_B.", ".lora_A.")]
            table[name.replace(".lora_B.weight", ".weight")].data += scale * up @ down


@pytest.mark.parametrize("boundaries", [None, 2])
def test_the_stack_is_the_merged_copy_and_leaves_the_teacher_alone(
    pipeline: Path, boundaries: int | None
) -> None:
    def fresh() -> Any:
        return load_backbone(pipeline, device="cpu", max_sequence_length=8)

    def noisy(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {n: 0.1 * torch.randn(v.shape, generator=draw) for n, v in state.items()}

    donor = adapter_roles(fresh(), SETTINGS, seed=3, boundaries=boundaries)
    few, fake = noisy(donor.generator.state(), 1), noisy(donor.fake_score.state(), 2)
    backbone = fresh()
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    given = x, torch.tensor([0.9, 0.4]), backbone.encode(["a", "b"])
    with torch.no_grad():
        bare = backbone.velocity(backbone.teacher_base, *given, 3.0)
    roles = adapter_roles(
        backbone,
        SETTINGS,
        seed=4,
        few_step=(SETTINGS, few),
        fake_score=fake,
        fresh_fake_score=True,
        boundaries=boundaries,
    )
    assert roles.fake_score_below is not None
    kept = roles.state()
    assert torch.equal(kept["few_step"][next(iter(few))], few[next(iter(few))])
    assert all(torch.equal(kept["few_step_fake_score"][n], v) for n, v in fake.items())
    assert not any(p.requires_grad for p in roles.fake_score_below.parameters.values())
    for name, stack in (("generator", roles.generator), ("fake_score", roles.fake_score)):
        last = stack.singles[-1]
        part = few if name == "generator" else roles.fake_score_below.singles[-1].state()
        alone = fresh()
        merged(alone, alone.teacher_base, dict(part))
        single = adapter_roles(alone, SETTINGS, seed=9).generator
        with torch.no_grad():  # before any training: the fresh adapter does nothing
            torch.testing.assert_close(last(*given), single(*given), rtol=1e-4, atol=1e-5)
        last.load(noisy(last.state(), 5))
        single.load(last.state())
        values = []
        for role in (last, single):
            v = role(*given)
            v.square().sum().backward()
            values.append((v.detach(), [p.grad for p in role.parameters.values()]))
        torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(roles.teacher(*given, 3.0), bare)


# --- averages ----------------------------------------------------------------------------------


def test_the_average_of_stage_2_is_the_published_one() -> None:
    """Their loop: in each of a rollout's 16 parts a step, whose count grows in the last part."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs, ours, count, now = 0.0, 0.0, 0, 0.0
    averaging = Averaging(0.9, warmup=True, interval=8, repeats=16)
    for rollout, value in enumerate(values.tolist()):
        for part in range(16):
            if part == 15:
                now, count = value, count + 1
            if (count + 1) % 8 == 0:
                theirs += (1 - min((1 + count) / (10 + count), 0.9)) * (now - theirs)
        decay = averaging.at(rollout + 1)
        if decay is not None:
            ours = decay * ours + (1 - decay) * value
        if (rollout + 1) % 8 != 7:  # after the 7th their other 15 steps are in the next rollout
            assert ours == pytest.approx(theirs, abs=1e-12)
    assert [n for n in range(1, 20) if averaging.at(n)] == [7, 15]
    assert Averaging(0.99).at(3) == 0.99


# --- guidance ----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_students_guidance_is_apart_from_the_teachers(
    tiny_pipeline: Callable[[str], Path],
) -> None:
    path = tiny_pipeline("flux_dev")
    backbone = load_backbone(path, device="cpu", resolution=64, max_sequence_length=16)
    assert isinstance(backbone, FluxBackbone) and backbone.embedded_guidance == 3.5
    roles = adapter_roles(backbone, AdapterSettings(2, 4.0, ["attn.to_q"]), seed=0, guidance=1.0)
    x = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    given = x, torch.tensor([0.7]), backbone.encode(["a"])
    low, high = (backbone.velocity(backbone.teacher_base, *given, g) for g in (1.0, 3.5))
    assert not torch.equal(low, high)
    for role in (roles.generator, roles.fake_score, roles.ema):
        assert torch.equal(role(*given), low) and torch.equal(role.field(given[2])(*given[:2]), low)
    assert torch.equal(roles.teacher(*given, 3.5), high) and torch.equal(
        roles.teacher(*given), high
    )
