"""A fake score for each boundary against one for all (`train.fake_scores`), and the weight that a
boundary's matching gradient has (`train.boundary_power`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.method.boundary import Boundary
from tiltflow.models.roles import fit_to_boundaries
from tiltflow.setup.build import Build, build_stage

SMALL = (
    "train.batch_size=8", "train.fake_scores=per_boundary",
    "train.generator_lr=1e-3", "train.fake_score_lr=1e-3", "log.every=1",
)  # fmt: skip
K = 4


def built(stage: str, out: Path, *options: str) -> Build:
    return build_stage(load_config(f"mixture_{stage}", [*SMALL, f"run.out={out}", *options]))


def boundary_of(name: str) -> int:
    return int(name.removeprefix("boundary").partition(".")[0])


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[int]:
    return {boundary_of(n) for n in before if not torch.equal(before[n], after[n])}


def snapshot(build: Build) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in build.stage.roles.fake_score.state().items()}


def test_an_update_trains_the_fake_score_of_its_boundary_alone(tmp_path: Path) -> None:
    made = built("cold_start", tmp_path, "cold_start.generator_every=1")
    role = made.stage.roles.fake_score
    assert {boundary_of(n) for n in role.parameters} == set(range(1, K + 1))
    seen = set()
    for step in range(8):
        stop = int(made.stage.randomness.integers("stop", step, 1, K + 1, (1,)))
        before = snapshot(made)
        made.stage.iteration(step)
        assert changed(before, snapshot(made)) == {stop}
        seen.add(stop)
    assert len(seen) > 1


def test_the_matching_gradient_takes_the_fake_score_of_its_boundary(tmp_path: Path) -> None:
    stage = built("cold_start", tmp_path).stage
    x = torch.randn(8, *stage.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, prompts = stage.prompts.select([0] * 8, x.device)
    s = stage.sigmas[3].expand(8)
    before = stage.matching.gradient("m", 0, Boundary(x, s, 3, cond, prompts))
    with torch.no_grad():
        for name, parameter in stage.roles.fake_score.parameters.items():
            if boundary_of(name) != 3:
                parameter.add_(0.1)
    assert torch.equal(stage.matching.gradient("m", 0, Boundary(x, s, 3, cond, prompts)), before)
    assert not torch.equal(
        stage.matching.gradient("m", 0, Boundary(x, s, 2, cond, prompts)), before
    )


def test_samples_of_several_boundaries_need_the_shared_one(tmp_path: Path) -> None:
    role = built("cold_start", tmp_path).stage.roles.fake_score
    with pytest.raises(AssertionError, match="a network for each boundary"):
        role.at(None)
    shared = built("cold_start", tmp_path / "s", "train.fake_scores=shared").stage.roles.fake_score
    assert shared.at(None) is shared and shared.at(2) is shared


def test_boundary_power_weighs_by_level(tmp_path: Path) -> None:
    """At s the gradient counts (1 − s)^−p times; at the last boundary, s = 0, always once."""
    plain = built("cold_start", tmp_path / "a").stage
    weighed = built("cold_start", tmp_path / "b", "train.boundary_power=1.5").stage
    x = torch.randn(8, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, prompts = plain.prompts.select([0] * 8, x.device)
    for k in range(1, K + 1):
        s = plain.sigmas[k].expand(8)
        g, h = (
            stage.matching.gradient("m", 0, Boundary(x, s, k, cond, prompts))
            for stage in (plain, weighed)
        )
        torch.testing.assert_close(h, g * (1 - float(plain.sigmas[k])) ** -1.5)
    assert torch.equal(h, g)


@pytest.mark.parametrize("match_steps", ["last", "random", "all"])
def test_both_stages_train_resume_and_hand_over(match_steps: str, tmp_path: Path) -> None:
    from rich.console import Console

    from tiltflow.tasks.train import run_training

    def run(stage: str, out: Path, *options: str) -> Path:
        values = [*SMALL, f"run.out={out}", "checkpoint.every=3", *options]
        run_training(load_config(f"mixture_{stage}", values), Console(quiet=True))
        return out

    cold = run("cold_start", tmp_path / "cold", "train.steps=5", "watch.rewards={}")
    more = [
        f"model.few_step={cold}", f"tilt.match_steps={match_steps}", "tilt.group_size=4",
        "tilt.fake_score_updates=3", "watch.rewards={}",
    ]  # fmt: skip
    start = build_stage(
        load_config("mixture_tilt", [*SMALL, f"run.out={tmp_path / 'x'}", *more])
    ).stage.roles
    stage_one = load_checkpoint(cold).tensors["fake_score"]
    assert all(torch.equal(start.fake_score.state()[n], v) for n, v in stage_one.items())
    whole = run("tilt", tmp_path / "whole", "train.steps=5", *more)
    run("tilt", tmp_path / "parts", "train.steps=3", *more)
    parts = run("tilt", tmp_path / "parts", "train.steps=5", "run.resume=true", *more)
    a, b = (load_checkpoint(d).tensors for d in (whole, parts))
    assert latest_step(parts) == 5
    assert all(torch.equal(a[g][n], b[g][n]) for g in a for n in a[g])
    trained = changed(dict(stage_one), dict(a["fake_score"]))
    assert trained == {K} if match_steps == "last" else len(trained) > 1
    assert all(row["fake_score/ambient"] > 0 for row in read_metrics(whole / "metrics.jsonl"))


def test_weights_go_from_one_fake_score_to_several_and_back() -> None:
    shared = {"w": torch.zeros(2), "b": torch.ones(1)}
    several = fit_to_boundaries(shared, 2)
    assert set(several) == {"boundary1.w", "boundary1.b", "boundary2.w", "boundary2.b"}
    assert fit_to_boundaries(shared, None) == shared and fit_to_boundaries(several, 2) == several
    several["boundary2.w"] = torch.full((2,), 5.0)
    back = fit_to_boundaries(several, None)
    assert set(back) == {"w", "b"} and torch.equal(back["w"], several["boundary2.w"])
