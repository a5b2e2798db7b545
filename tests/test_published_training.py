"""Both stages with the published choices: resumed to the bit, the same on two ranks, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distributed import Runner, home, run, server  # noqa: F401  (fixtures)
from test_train import QUIET, pipeline, prompts, recipe, weights  # noqa: F401  (fixtures)
from test_train import run as train

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.data.prompts import Prompt
from tiltflow.setup.build import build_stage
from tiltflow.tasks.request import Request, prepare
from tiltflow.tasks.train import run_training

COLD = (
    "cold_start.keep_graph=false",
    "cold_start.fresh_boundary=true",
    "train.ema_every=iteration",
)
LOSS = (
    "tilt.policy_reduction=sum",
    "tilt.merge_same_prompts=true",
    "tilt.drop_zero_advantages=true",
    "tilt.kl=0.1",
    "tilt.kl_form=gaussian",
    "train.ema_warmup=true",
    "train.ema_interval=2",
    "train.ema_repeats=3",
    "train.fake_score_weight_decay=0.1",
)
TILT = (*LOSS, "tilt.round_images=true", "tilt.fake_score_start=fresh", "adapters.init_std=1.0")


@pytest.fixture(scope="module")
def cold(pipeline: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return train("cold_start", pipeline, prompts, tmp_path_factory.mktemp("runs") / "cold", *COLD)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_resumed_equals_uninterrupted(
    stage: str,
    pipeline: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    cold: Path,
    tmp_path: Path,
) -> None:
    more = COLD if stage == "cold_start" else (*TILT, f"model.few_step={cold}")
    parts, there = tmp_path / "parts", tmp_path / "stage_1"
    whole = cold
    if stage == "tilt":
        whole = train(stage, pipeline, prompts, tmp_path / "whole", *more)
        more = (*TILT, f"model.few_step={shutil.copytree(cold, there)}")
    train(stage, pipeline, prompts, parts, "train.steps=2", *more)
    shutil.rmtree(there, ignore_errors=True)  # stage 2's own checkpoint has what it stands on
    train(stage, pipeline, prompts, parts, "run.resume=true", *more)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    if stage == "tilt":  # stage 1's fake score lies frozen under a fresh one
        below = {n for n in a if n.startswith("few_step_fake_score/")}
        before = weights(cold)
        assert below
        for name in below:
            assert torch.equal(a[name], before[name.replace("few_step_", "")])
        assert any(bool((a[n] != 0).any()) for n in a if n.startswith("fake_score/"))


def test_from_a_lora_folder_the_fresh_fake_score_lies_on_the_teacher(
    pipeline: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    cold: Path,
    tmp_path: Path,
) -> None:
    few = f"model.few_step={cold / 'export' / 'few_step'}"
    made = train("tilt", pipeline, prompts, tmp_path / "t", *TILT, few, "train.steps=2")
    assert "few_step_fake_score" not in load_checkpoint(made).tensors


@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_two_ranks_are_one(run: Runner, stage: str) -> None:  # noqa: F811
    """On the mixture, to the order of sums."""
    more = ["train.batch_size=30", "train.steps=6", "log.every=5", "checkpoint.every=6"]
    more += COLD if stage == "cold_start" else [*LOSS, "tilt.group_size=5"]
    first = run(f"published_before_{stage}", "mixture_cold_start", 1, *more[:4], *COLD)
    if stage == "tilt":
        more.append(f"model.few_step={first}")
    found = [
        weights(run(f"published_{stage}_{size}", f"mixture_{stage}", size, *more))
        for size in (1, 2)
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_two_ranks_are_one_on_a_pipeline(
    run: Runner,  # noqa: F811
    pipeline: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    cold: Path,
    tmp_path: Path,
) -> None:
    """Of LoRAs, whose images are decoded and rounded; to the order of sums."""
    more = [*TILT, f"model.few_step={cold}", "train.steps=2", "log.samples_every=0"]
    options = [o for o in recipe("tilt", pipeline, prompts, tmp_path, *more) if "run." not in o]
    one, two = (weights(run(f"pipeline_{n}", "demo_tilt", n, *options)) for n in (1, 2))
    assert one.keys() == two.keys()
    assert any(bool((v != 0).any()) for n, v in one.items() if "generator/" in n and "lora_B" in n)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_flux_1_trains_its_student_at_its_own_guidance(
    tiny_pipeline: Callable[[str], Path],
    prompts: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The teacher at 3.5, the student at 1.0 in training, sampling and the exported card."""
    # training's own products round otherwise than the sampler's, which are the pipeline's
    monkeypatch.setattr("tiltflow.models.pipelines.products.available", lambda: False)
    given = [
        f"model.path={tiny_pipeline('flux_dev')}",
        "model.dtype=fp32",
        "model.resolution=64",
        "model.max_sequence_length=16",
        "model.gradient_checkpointing=false",
        "adapters.rank=2",
        "adapters.alpha=4.0",
        f"data.prompts={prompts}",
        "train.steps=2",
        "train.batch_size=2",
        "train.micro_batch_size=2",
        "cold_start.generator_every=1",
        f"run.out={tmp_path / 'run'}",
        "run.device=cpu",
    ]
    cfg = load_config("flux1_dev_cold_start", given)
    stage = build_stage(cfg).stage
    assert stage.matching.guidance == 3.5 and stage.roles.teacher.guidance is None
    assert stage.roles.generator.guidance == stage.roles.fake_score.guidance == 1.0
    run_training(cfg, QUIET)
    out = tmp_path / "run"
    assert load_checkpoint(out).state["student_guidance"] == 1.0
    assert "guidance_scale=1.0" in (out / "export" / "README.md").read_text()
    ema = stage.roles.ema
    ema.load(load_checkpoint(out).tensors["ema"])
    lines = [Prompt(line) for line in ("a cat", "a dog")]
    few_step = out / "export" / "few_step"
    loaded, sampler = prepare(Request(cfg.model.path, lines, few_step, device="cpu", batch=2))
    student = loaded.students["ac_dmd"]
    assert student.guidance == 1.0
    again = sampler.few_step(student, [0, 1])
    assert again.equal(sampler.few_step(ema, [0, 1]))
    assert not again.equal(sampler.few_step(replace(student, guidance=3.5), [0, 1]))


def test_a_student_with_classifier_free_guidance_is_refused(
    pipeline: Path,  # noqa: F811
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    options = recipe("cold_start", pipeline, prompts, tmp_path, "model.student_guidance=2.0")
    with pytest.raises(ValueError, match="is for models that take the scale as an input"):
        build_stage(load_config("demo_cold_start", options))
