"""Both stages end to end on the mixture and on a tiny SD3: resume, micro-batches, kill -9."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_pipelines import build

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.data.prompts import Prompt
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.setup.watch_prompts import spread_out
from tiltflow.tasks.train import run_training
from tiltflow.training.optim import NonFiniteError

QUIET = Console(quiet=True)
SRC = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sd35m", tmp_path_factory.mktemp("pipelines") / "sd35m")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\na red bird\n")
    return path


def recipe(stage: str, pipeline: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    """Overrides that turn a demo recipe into a run of seconds on a tiny pipeline."""
    base = [
        f"model.path={pipeline}",
        "model.autocast=null",
        "model.max_sequence_length=8",
        "adapters.rank=4",
        "adapters.alpha=8.0",
        f"data.prompts={prompts}",
        f"data.eval_prompts={prompts}",
        "train.batch_size=4",
        "train.steps=6",
        "watch.rewards={}",
        "checkpoint.every=2",
        "log.every=1",
        "log.samples_every=3",
        "log.samples=2",
        f"run.out={out}",
        "run.device=cpu",
    ]
    if stage == "cold_start":
        base += ["cold_start.generator_every=2"]
    else:
        base += ["tilt.group_size=2", "rewards={'test_train:redness': 1.0}"]
    return [*base, *more]


def redness(images, prompts, metadata):
    """A reward by dotted path: how red an image is; differentiable."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


redness.differentiable = True


def weights(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_checkpoint(run).tensors
    return {f"{group}/{k}": v for group, table in tensors.items() for k, v in table.items()}


def run(stage: str, *args, **kwargs) -> Path:
    return run_training(load_config(f"demo_{stage}", recipe(stage, *args, **kwargs)), QUIET)


@pytest.fixture(scope="module")
def cold(pipeline: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("cold_start", pipeline, prompts, tmp_path_factory.mktemp("runs") / "cold")


def further(stage: str, cold: Path) -> list[str]:
    return [f"model.few_step={cold}"] if stage == "tilt" else []


REUSE = ["cold_start.reuse=3", "cold_start.generator_every=5"]  # step 2 is within a cycle


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("cold_start", []),
        pytest.param("cold_start", REUSE, marks=pytest.mark.long),
        ("tilt", []),
    ],
)
def test_resumed_equals_uninterrupted(
    stage: str, options: list[str], pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    more = [*further(stage, cold), *options]
    whole = run(stage, pipeline, prompts, tmp_path / "whole", *more)
    run(stage, pipeline, prompts, tmp_path / "parts", "train.steps=2", *more)
    run(stage, pipeline, prompts, tmp_path / "parts", "run.resume=true", *more)
    a, b = weights(whole), weights(tmp_path / "parts")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [read_metrics(d / "metrics.jsonl") for d in (whole, tmp_path / "parts")]
    assert lines[0] == lines[1] and [row["step"] for row in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert (whole / "samples" / "step-000003.png").is_file()
    folders = {"cold_start": {"few_step"}, "tilt": {"few_step", "tilt"}}[stage]
    assert {p.name for p in (whole / "export").iterdir()} == {
        *folders, "scheduler", "README.md", "contract.json"
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_micro_batches_equal_one_batch(
    stage: str, pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    """To summation order: the relative difference of the weights after the run is tiny. Of single
    weights it is larger where Adam divides a gradient near 0 by its own size."""
    more = further(stage, cold)
    whole = weights(run(stage, pipeline, prompts, tmp_path / "a", *more))
    half = weights(run(stage, pipeline, prompts, tmp_path / "b", "train.micro_batch_size=2", *more))
    for name in (n for n in whole if n.startswith(("generator/", "fake_score/"))):
        torch.testing.assert_close(half[name], whole[name], rtol=2e-3, atol=1e-4)
        assert (half[name] - whole[name]).norm() <= 1e-3 * whole[name].norm(), name


def test_training_changes_what_it_should(
    cold: Path, pipeline: Path, prompts: Path, tmp_path
) -> None:
    before = weights(cold)
    tilted = weights(run("tilt", pipeline, prompts, tmp_path / "t", f"model.few_step={cold}"))
    kept = [n.removeprefix("few_step/") for n in tilted if n.startswith("few_step/")]
    assert kept and all(torch.equal(tilted[f"few_step/{n}"], before[f"ema/{n}"]) for n in kept)
    assert any(
        bool((v != 0).any())
        for n, v in tilted.items()
        if n.startswith("generator/") and "lora_B" in n
    )


@pytest.mark.parametrize("match_steps", ["random", "all"])
@pytest.mark.parametrize("log_prob", ["unit", "gaussian"])
def test_options_of_stage_two(
    match_steps: str, log_prob: str, pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    out = run(
        "tilt", pipeline, prompts, tmp_path / "run", f"model.few_step={cold}", "train.steps=2",
        f"tilt.match_steps={match_steps}", f"tilt.log_prob={log_prob}", "tilt.kl=0.1",
    )  # fmt: skip
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[0]["policy/ratio_gap"] == 0 and rows[0]["policy/kl"] == 0
    assert rows[1]["policy/kl"] > 0


def test_rewards_go_back_through_several_steps(
    pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    """The policy gradient has the steps that are left, and none when all are taken."""
    seen = {}
    for steps, more in ((1, ()), (3, ()), (4, ("tilt.policy_weight=0.0",))):
        out = run(
            "tilt", pipeline, prompts, tmp_path / str(steps), f"model.few_step={cold}",
            "train.steps=1", "tilt.subset=1", f"tilt.reward_steps={steps}", *more,
        )  # fmt: skip
        (seen[steps],) = read_metrics(out / "metrics.jsonl")
    assert "policy/ratio_gap" in seen[3] and "policy/ratio_gap" not in seen[4]
    assert all(row["generator/at_target"] == 0 for row in seen.values())
    assert all(row["generator/reward_gradient"] > 0 for row in seen.values())
    assert len({row["generator/grad_norm"] for row in seen.values()}) == 3


def test_samples_above_the_rewards_target_are_counted_and_said_once(
    pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    """They have no gradient: a reward of a large scale would be trained on in name alone."""
    screen = io.StringIO()
    for target, share in ((-10, 1), (10, 0)):
        more = [f"model.few_step={cold}", "train.steps=2", f"tilt.reward_target={target}"]
        out = tmp_path / str(target)
        cfg = load_config("demo_tilt", recipe("tilt", pipeline, prompts, out, *more))
        run_training(cfg, Console(file=screen, width=400))
        rows = read_metrics(out / "metrics.jsonl")
        assert [row["generator/at_target"] for row in rows] == [share, share]
        assert [row["generator/reward_gradient"] > 0 for row in rows] == [share == 0] * 2
        assert screen.getvalue().count("at step 1 100% of the samples score above") == 1
    assert "tilt.reward_target=-10, where the rewards have no gradient" in screen.getvalue()


def test_a_reward_that_nothing_takes_is_refused(
    pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    """Without the policy what is not back-propagated would be scored, and train nothing."""
    more = [f"model.few_step={cold}", "tilt.policy_weight=0"]
    table = "rewards={'test_train:redness': {'weight': 1, 'backprop': false}, clipscore: 1}"
    with pytest.raises(ValueError, match="redness is not back-propagated and tilt.policy_weight"):
        run("tilt", pipeline, prompts, tmp_path / "run", *more, table)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_sample_is_decoded_once(
    pipeline: Path, prompts: Path, cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its scores and for the gradient of its reward alike."""
    rows: list[int] = []
    decode = PipelineBackbone.decode

    def counted(self: PipelineBackbone, latents: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(PipelineBackbone, "decode", counted)
    out = run(
        "tilt", pipeline, prompts, tmp_path / "run", f"model.few_step={cold}", "train.steps=1",
        "watch.rewards={}", "log.samples_every=0", "tilt.decode_chunk=2",
    )  # fmt: skip
    (row,) = read_metrics(out / "metrics.jsonl")
    assert row["generator/reward_gradient"] > 0
    assert sum(rows) == load_config(str(out / "config.yaml"), []).train.batch_size
    assert max(rows) == 2


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_normalised_reward_gradient_does_not_know_the_reward_s_scale(
    steps: int, pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    after = {}
    for scale, normalise in itertools.product((1.0, 1000.0), ("true", "false")):
        out = run(
            "tilt", pipeline, prompts, tmp_path / f"{scale}{normalise}", f"model.few_step={cold}",
            "train.steps=1", f"tilt.reward_steps={steps}", "tilt.policy_weight=0.0",
            "tilt.matching_weight=0.0",
            f"tilt.reward_normalise={normalise}", "tilt.reward_target=1e6",
            "tilt.reward_weight=1.0", f"rewards={{'test_train:bright': {scale}}}",
        )  # fmt: skip
        (row,) = read_metrics(out / "metrics.jsonl")
        after[scale, normalise] = row["generator/grad_norm"]
    assert after[1000.0, "true"] == pytest.approx(after[1.0, "true"], rel=1e-4)
    assert after[1000.0, "false"] > 100 * after[1.0, "false"]


@pytest.mark.long
def test_copies_train_like_adapters(pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    kind = "adapters.kind=copies"
    first = run("cold_start", pipeline, prompts, tmp_path / "a", kind, "train.steps=2")
    run("tilt", pipeline, prompts, tmp_path / "b", kind, "train.steps=2", f"model.few_step={first}")
    assert latest_step(tmp_path / "b") == 2


def test_an_existing_run_is_not_overwritten(cold: Path, pipeline: Path, prompts: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run at step 6"):
        run("cold_start", pipeline, prompts, cold)


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


bright.differentiable = True  # type: ignore[attr-defined]


def broken(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    scores[1] = float("nan")
    return scores


broken.at_once = 2  # type: ignore[attr-defined]


def test_a_reward_that_is_nan_stops_the_run(
    pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="broken.*a (cat|dog|red bird)"):
        run(
            "tilt", pipeline, prompts, tmp_path / "run", f"model.few_step={cold}",
            "rewards={'test_train:broken': 1.0}",
        )  # fmt: skip


def test_a_loss_that_is_not_finite_names_step_term_and_prompt(
    pipeline: Path, prompts: Path, cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiltflow.training import updates

    real = updates.fake_score_objective

    def poisoned(*args, **kwargs):
        losses, parts = real(*args, **kwargs)
        return losses * torch.tensor([1.0, float("inf"), 1.0, 1.0]), parts

    monkeypatch.setattr(updates, "fake_score_objective", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 0: the fake-score loss is inf for .* 'a"):
        run("cold_start", pipeline, prompts, tmp_path / "run")


def test_a_sheet_of_samples_that_are_not_finite_names_step_and_prompt(
    pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be black squares."""
    from tiltflow.evaluation.watch import probes

    def broken(role, cond, numbers, *given):
        made = sample_few_step(role, cond, numbers, *given)
        first = not (tmp_path / "run" / "samples").exists()
        return (
            made if first else made.where(torch.tensor(numbers).view(-1, 1, 1, 1) != 1, torch.nan)
        )

    sample_few_step = probes.sample_few_step
    monkeypatch.setattr(probes, "sample_few_step", broken)
    second = spread_out([Prompt(text) for text in prompts.read_text().splitlines()])[1].text
    said = f"step 3: the image that ema made of {second!r} is not finite"
    with pytest.raises(NonFiniteError, match=said):
        run("cold_start", pipeline, prompts, tmp_path / "run")
    assert [png.name for png in (tmp_path / "run").rglob("*.png")] == ["step-000000.png"]


@pytest.mark.long
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_killed_and_resumed_equals_uninterrupted(
    stage: str, pipeline: Path, prompts: Path, cold: Path, tmp_path: Path
) -> None:
    more = [*further(stage, cold), "train.steps=8", "log.samples_every=0"]
    whole = weights(run(stage, pipeline, prompts, tmp_path / "whole", *more))
    out = tmp_path / "killed"
    arguments = [sys.executable, "-m", "tiltflow", "train", f"demo_{stage}"]
    arguments += recipe(stage, pipeline, prompts, out, *more)
    where = os.pathsep.join([str(SRC), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": where}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.time() + 240
    while (latest_step(out) or 0) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (latest_step(out) or 0) >= 3
    resumed = weights(run(stage, pipeline, prompts, out, *more, "run.resume=true"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
