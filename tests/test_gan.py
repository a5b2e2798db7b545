"""The term `gan`: DMD2's adversarial losses, a head of its own that is saved and resumed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, cold_start, tilt
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.distributed import Ranks
from tiltflow.flow import interpolate
from tiltflow.method.adversarial import realism_loss, unreality_loss
from tiltflow.setup.build import build_stage
from tiltflow.training.adversarial import Adversary
from tiltflow.training.own_terms import Held
from tiltflow.training.terms import Attached, Epoch, single
from tiltflow.training.tilt import Tilt
from tiltflow.training.updates import Share

OWN = "tilt.terms={gan: {weight: 1.0, real_steps: 3, one_in: 2, lr: 0.01}}"
ALONE = ["tilt.policy_weight=0", "tilt.matching_weight=0", "tilt.reward_weight=0"]


def test_its_losses_are_its_papers() -> None:
    """DMD2 (2405.14867): −log D for the generator, −log D − log(1 − D) for the discriminator."""
    logits = torch.tensor([math.log(3.0), 0.0])  # D = 3/4 and 1/2
    torch.testing.assert_close(realism_loss(logits), torch.log(torch.tensor([4 / 3, 2.0])))
    torch.testing.assert_close(unreality_loss(logits), torch.log(torch.tensor([4.0, 2.0])))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_start(tmp_path_factory.mktemp("cold"))


@pytest.fixture
def stage(cold: Path) -> Tilt:
    chosen = [f"model.few_step={cold}", "run.out=unused", *SHORT, "tilt.group_size=4", OWN]
    made = build_stage(load_config("mixture_tilt", chosen)).stage
    assert isinstance(made, Tilt)
    return made


def epoch_of(stage: Tilt, step: int) -> Epoch:
    """An epoch with its rollout; no scores, which this term does not look at."""
    cond, prompts = stage._prompts(step)
    trajectory, _ = stage._rollout(step, cond, {})
    unscored: object = None
    return Epoch(step, trajectory, prompts, unscored, torch.zeros(8))  # type: ignore[arg-type]


def adversary(stage: Tilt) -> Adversary:
    (found,) = [term.term for term in stage.terms if isinstance(term, Held)]
    assert isinstance(found, Adversary)
    return found


def test_the_generator_follows_minus_log_d_at_its_samples(stage: Tilt) -> None:
    term, epoch = adversary(stage), epoch_of(stage, 3)
    loss = term.begin(epoch)
    x = epoch.trajectory.end.clone().requires_grad_()
    rows, whole = slice(0, 8), epoch.trajectory.rows(slice(0, 8))
    at = Attached(single(3), rows, whole, x, x, torch.zeros(8))
    loss(at)[0].sum().backward()

    def total(x: Tensor) -> Tensor:
        t, noise = term._noised(x, "fake", 3)
        logits = term.head(term.features(interpolate(x, noise, t), t, whole.conditioning))
        return realism_loss(logits).sum()

    step = 1e-2
    for row, place in ((0, 0), (3, 1), (7, 0)):
        moved = torch.zeros(8, 2)
        moved[row, place] = step
        end = epoch.trajectory.end
        slope = (total(end + moved) - total(end - moved)).detach() / (2 * step)
        assert x.grad is not None
        torch.testing.assert_close(x.grad[row, place], slope, rtol=0.02, atol=1e-3)


def test_only_the_head_learns_from_it(stage: Tilt) -> None:
    """The fake score has its own loss; its weights see nothing of this one's."""
    adversary(stage).begin(epoch_of(stage, 0))
    assert all(p.grad is None for p in stage.roles.fake_score.parameters.values())
    assert all(p.grad is None for p in stage.roles.generator.parameters.values())


def test_the_head_learns_to_tell_them_apart(stage: Tilt) -> None:
    """A generator far away: its loss falls below that of a guess, 2 log 2."""
    term = adversary(stage)
    losses = []
    for step in range(60):
        epoch = epoch_of(stage, step)
        states = {k: x + 4 if k == 4 else x for k, x in epoch.trajectory.states.items()}
        away = dataclasses.replace(epoch.trajectory, states=states)
        losses.append(
            float(
                term._learn(
                    dataclasses.replace(epoch, trajectory=away),
                    term._noised(away.end, "fake", step),
                ).mean()
            )
        )
    guess = 2 * math.log(2)
    assert abs(losses[0] - guess) < 0.5 * guess
    assert sum(losses[-10:]) / 10 < 0.6 * guess


def test_ranks_that_share_the_base_ask_the_teacher_equally_often(
    stage: Tilt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of one rank alone would wait for the others' for ever."""
    parts = dataclasses.replace(stage, share=Share(12, 2, Ranks(1, 2)))
    Adversary(parts, Adversary.Settings(one_in=4))  # each has a copy of its own
    monkeypatch.setattr("tiltflow.training.adversarial.shared", lambda network: True)
    Adversary(parts, Adversary.Settings(one_in=3))
    with pytest.raises(ValueError, match="one_in 4 does not divide a rank's 6 samples"):
        Adversary(parts, Adversary.Settings(one_in=4))


def tensors(out: Path) -> dict[str, Tensor]:
    found = load_checkpoint(out).tensors
    return {f"{group}.{n}": v for group, own in found.items() for n, v in own.items()}


def test_it_goes_on_where_it_stopped_head_and_all(cold: Path, tmp_path: Path) -> None:
    tilt(tmp_path / "whole", cold, OWN)
    tilt(tmp_path / "parts", cold, OWN, "train.steps=2")
    tilt(tmp_path / "parts", cold, OWN, "run.resume=true")
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert any(name.startswith("gan_head.") for name in whole)
    assert any(name.startswith("optimizer_gan_head.") for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    tilt(tmp_path / "small", cold, OWN, "train.micro_batch_size=4")
    small = tensors(tmp_path / "small")
    for name in (n for n in whole if not n.startswith("optimizer")):
        torch.testing.assert_close(whole[name], small[name], rtol=1e-3, atol=1e-4)


def test_it_moves_the_generator_and_off_it_is_off(cold: Path, tmp_path: Path) -> None:
    start = dict(load_checkpoint(cold).tensors["ema"])
    on = tilt(tmp_path / "on", cold, *ALONE, OWN)
    assert not all(torch.equal(on[name], start[name]) for name in on)
    off = tilt(tmp_path / "off", cold, *ALONE, "tilt.terms={gan: {weight: 0.0}}")
    assert all(torch.equal(off[name], start[name]) for name in off)


def test_a_run_without_a_head_is_not_gone_on_with_as_one_with(cold: Path, tmp_path: Path) -> None:
    tilt(tmp_path / "run", cold, "train.steps=2")
    with pytest.raises(ValueError, match="gan_head"):
        tilt(tmp_path / "run", cold, OWN, "run.resume=true")
