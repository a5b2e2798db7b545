"""The watch in a run: a planted reward that trips it, an honest one that does not, resuming."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train import recipe
from tiny_pipelines import build

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.evaluation.watch.history import read_history
from tiltflow.models.families.mixture import ring
from tiltflow.models.lora_files import read_adapter
from tiltflow.tasks.train import run_training

QUIET = Console(quiet=True)


def near_modes(points, prompts, metadata):
    """A held-out reward of points: 1 within three std of a mode of the teacher, else 0."""
    means = ring().means.to(points)
    return (torch.linalg.vector_norm(points[:, None] - means, dim=-1).amin(1) < 0.45).float()


def warmth(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 on the mixture, just far enough for a student that lands near the ring."""
    out = tmp_path_factory.mktemp("watch") / "cold"
    more = [f"run.out={out}", "run.device=cpu", "train.steps=200", "train.batch_size=128"]
    return run_training(load_config("mixture_cold_start", more), QUIET)


def points(cold: Path, out: Path, *more: str, console: Console = QUIET) -> Path:
    """Stage 2 on the mixture under the watch."""
    base = [
        f"run.out={out}", f"model.few_step={cold}", "run.device=cpu", "train.steps=20",
        "train.batch_size=128", "tilt.fake_score_updates=2",
        "train.ema=0.5", "checkpoint.every=10", "checkpoint.keep=1",
        "watch.rewards={'test_watch:near_modes': {weight: 1, options: {domain: points}}}",
        "watch.every=5", "watch.prompts=128", "watch.diversity_prompts=32",
    ]  # fmt: skip
    return run_training(load_config("mixture_tilt", [*base, *more]), console)


HACKED = ("tilt.reward_weight=100.0", "train.generator_lr=1.0e-3")


def alarms(run: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        texts = [str(v) for k, v in row.items() if k.startswith("alarm/")]
        if texts:
            found[row["step"]] = texts
    return found


def test_an_honest_reward_trips_nothing(cold: Path, tmp_path: Path) -> None:
    run = points(cold, tmp_path / "run")
    rows = read_metrics(run / "metrics.jsonl")
    seen = [row for row in rows if "watch/drift" in row]
    assert [row["step"] for row in seen] == [0, 5, 10, 15, 20]
    assert alarms(run) == {} and all(row["watch/alarms"] == 0 for row in seen)
    assert {"held_out/test_watch:near_modes", "watch/trained/linear", "watch/diversity"} <= set(
        seen[0]
    )
    assert 0.8 < seen[0]["watch/diversity"] < 1.2  # points all around the ring


def test_a_hacked_reward_is_caught_and_the_run_ends_at_the_last_good_checkpoint(
    cold: Path, tmp_path: Path
) -> None:
    warned = Console(record=True, width=500, file=(tmp_path / "log.txt").open("w"))
    free = points(cold, tmp_path / "free", *HACKED, console=warned)
    found = alarms(free)
    first = min(found)
    assert first < 20 and latest_step(free) == 20
    assert f"watch: step {first}: " in warned.export_text()
    history = read_history(free / "watch.jsonl")
    assert history[-1].mean("trained/linear") > history[0].mean("trained/linear") + 0.2
    good = max(m.step for m in history if m.clean)
    saved = sorted((free / "checkpoints").glob("step-*"))
    assert min(int(p.name[5:]) for p in saved) <= good  # kept from retention, though keep=1

    stopped = points(cold, tmp_path / "stopped", *HACKED, "watch.stop=true")
    assert alarms(stopped) == {first: found[first]}
    kept = latest_step(stopped)
    clean = [m.step for m in history if m.clean and m.step < first]
    assert kept == max(clean)
    last = read_metrics(stopped / "metrics.jsonl")[-1]
    assert last == {
        "step": first,
        "watch/ended": f"an alarm at step {first} ended the run; step {kept} is kept",
    }
    with pytest.raises(ValueError, match="already holds a run"):
        points(cold, tmp_path / "stopped", *HACKED)


def test_a_resumed_watch_judges_as_an_uninterrupted_one(cold: Path, tmp_path: Path) -> None:
    whole = points(cold, tmp_path / "whole", *HACKED)
    parts = points(cold, tmp_path / "parts", *HACKED, "train.steps=10")
    points(cold, tmp_path / "parts", *HACKED, "run.resume=true")
    for name in ("watch.jsonl", "metrics.jsonl"):
        assert (whole / name).read_text() == (parts / name).read_text()
    # without its memory, the watch takes the next look as the reference, and says nothing wrong
    (parts / "watch.jsonl").unlink()
    points(cold, tmp_path / "parts", *HACKED, "run.resume=true", "train.steps=25")
    history = read_history(parts / "watch.jsonl")
    assert [m.step for m in history] == [20, 25] and history[0].clean


@pytest.mark.long
def test_a_watch_resumed_with_other_levels_begins_a_new_reference(
    cold: Path, tmp_path: Path
) -> None:
    """A generator that stays as it is has other drift at other levels, and raises no alarm."""
    still = ("train.generator_lr=1e-12", "watch.rules.drift=1.05", "train.schedule=constant")
    points(cold, tmp_path / "run", *still, "train.steps=10")
    with (tmp_path / "log.txt").open("w") as file:
        told = Console(record=True, width=500, file=file)
        run = points(
            cold, tmp_path / "run", *still, "run.resume=true", "watch.levels=[0.02]", console=told
        )
    assert "watch: drift: measured otherwise than before" in told.export_text()
    history = read_history(run / "watch.jsonl")
    assert [bool("teacher/drift" in m.values) for m in history] == [True, False, False, True, False]
    assert abs(history[3].mean("drift") - history[0].mean("drift")) > 0.1
    assert alarms(run) == {}
    rows = read_metrics(run / "metrics.jsonl")
    assert [(r["step"], r["watch/anew"]) for r in rows if "watch/anew" in r] == [
        (15, "watch/drift")
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny pipeline, prompts, and a LoRA folder of its stage 1."""
    folder = tmp_path_factory.mktemp("images")
    pipeline, prompts = build("sd35m", folder / "sd35m"), folder / "prompts.txt"
    prompts.write_text("".join(f"a cat, number {number}\n" for number in range(8)))
    cfg = load_config(
        "demo_cold_start",
        recipe("cold_start", pipeline, prompts, folder / "cold", "train.steps=2"),
    )
    return pipeline, prompts, run_training(cfg, QUIET)


@pytest.mark.long
def test_the_watch_of_images_ends_with_the_good_export(
    images: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A rate that wrecks a tiny random SD3: everything is measured, and the export is sound."""
    pipeline, prompts, stage_one = images
    out = tmp_path / "run"
    more = [
        f"model.few_step={stage_one / 'export' / 'few_step'}", "train.generator_lr=0.3",
        "watch.rewards={'test_watch:warmth': 1.0}", "watch.clip=packaged:clip_heldout",
        "watch.every=1", "watch.prompts=8", "watch.diversity_prompts=8", "watch.teacher_images=8",
        "watch.teacher_steps=2", "watch.diversity_images=2", "watch.stop=true", "train.steps=16",
        "watch.rules.alpha=0.2", "watch.rules.high_frequency=1.2", "watch.rules.drift=1.02",
        "watch.rules.diversity=0.9", "log.samples_every=0", "train.schedule=constant",
        "train.warmup=0", "train.betas=[0.9,0.999]",
    ]  # fmt: skip
    run_training(load_config("demo_tilt", recipe("tilt", pipeline, prompts, out, *more)), QUIET)
    first = read_history(out / "watch.jsonl")[0]
    assert {n: len(v) for n, v in first.values.items()} == {
        "held_out/test_watch:warmth": 8, "trained/test_train:redness": 8, "diversity": 8,
        "high_frequency": 8, "teacher/high_frequency": 8, "drift": 8, "teacher/drift": 8,
    }  # fmt: skip
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[0]["step"] == 0 and rows[0]["watch/high_frequency"] > 0
    ended = re.fullmatch(
        r"an alarm at step (\d+) ended the run; step (\d+) is kept", rows[-1]["watch/ended"]
    )
    assert ended and latest_step(out) == int(ended[2]) < int(ended[1]) < 16
    exported = read_adapter(out / "export" / "tilt")[1]
    good = load_checkpoint(out, f"step-{int(ended[2]):06d}").tensors["ema"]
    assert exported.keys() == good.keys()
    for name in good:  # adapters.alpha over adapters.rank is 2, and goes into B
        assert torch.equal(exported[name], good[name] * (2.0 if ".lora_B." in name else 1.0))
    assert json.loads((out / "watch.jsonl").read_text().splitlines()[-1])["alarms"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("watch.stop=true watch.rewards={}", "watch.stop needs stage tilt and at least one reward"),
        ("watch.prompts=4", "watch.prompts is 4, but no test can tell"),
        ("watch.rules.drift=0.5", "watch.rules.drift"),
        ("watch.levels=[]", "watch.levels"),
        ("watch.rules.drfit=2", "watch.rules.drift"),
    ],
)
def test_settings_of_the_watch(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("demo_tilt", ["model.few_step=x", *change.split(" ")])


def test_a_rule_can_be_switched_off() -> None:
    cfg = load_config("demo_tilt", ["watch.rules.drift=null", "watch.rules.diversity=0.5"])
    assert cfg.watch.rules.drift is None and cfg.watch.rules.diversity == 0.5
