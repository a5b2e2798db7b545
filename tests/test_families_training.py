"""Both stages of every family of `families_table` on a tiny pipeline: trained from the generator's
own start, resumed, checkpointed, and with a base in 8 bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families_table import CASES
from lengths import mostly_long
from rich.console import Console
from torch import Tensor

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.setup.build import Build, build_stage
from tiltflow.tasks.train import run_training
from tiltflow.training.buckets import Bucketed

Tiny = Callable[[str], Path]
QUIET = Console(quiet=True)
PROMPTS = ["a red cat", "two dogs and a very long story of what they did on the way home", "x"]


def bright(images: Tensor, prompts: object, metadata: object) -> Tensor:
    """A differentiable reward."""
    return images.flatten(1).mean(1)


bright.differentiable = True  # type: ignore[attr-defined]


def recipe(stage: str, family: str, tiny: Tiny, out: Path, *more: str) -> RunConfig:
    """A run of seconds on the family's first tiny pipeline, and its generator's."""
    case, prompts = CASES[family], out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    second = f"model.generator_path={tiny(case.generator)}" if case.generator else ""
    values = [
        f"model.path={tiny(case.names[0])}", f"model.family={family}", "model.resolution=64",
        f"model.max_sequence_length={case.tokens}", "model.dtype=fp32", f"data.prompts={prompts}",
        f"run.out={out}", "run.device=cpu", "train.steps=2", "train.batch_size=4",
        "train.micro_batch_size=2", "train.generator_lr=0.01", "train.fake_score_lr=0.01",
        "adapters.rank=2", "adapters.targets=null", "model.autocast=null",
        "log.samples_every=0", "watch.rewards={}", "checkpoint.every=1",
        *([second] if second else []),
    ]  # fmt: skip
    if stage == "tilt":
        values += ["tilt.group_size=4", "rewards={test_families_training:bright: 1.0}"]
    else:
        values += ["cold_start.generator_every=1"]
    return load_config(f"demo_{stage}", [*values, *more])


def run(stage: str, family: str, tiny: Tiny, out: Path, *more: str) -> dict[str, Tensor]:
    """A run's weights at its end, by group and name."""
    run_training(recipe(stage, family, tiny, out, *more), QUIET)
    tensors = load_checkpoint(out).tensors
    return {f"{g}/{k}": t for g, group in tensors.items() for k, t in dict(group).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", mostly_long(CASES, "sana"))
def test_both_stages_train_resume_and_checkpoint_exactly(
    tiny_pipeline: Tiny, tmp_path: Path, family: str
) -> None:
    cold = run("cold_start", family, tiny_pipeline, tmp_path / "cold")
    assert all(torch.isfinite(value).all() for value in cold.values())
    assert any("lora_B" in key and value.any() for key, value in cold.items())
    below = f"model.few_step={tmp_path / 'cold'}"
    whole = run("tilt", family, tiny_pipeline, tmp_path / "whole", below)
    assert any("ema/" in key and "lora_B" in key and value.any() for key, value in whole.items())
    # in two parts, and recomputing: either alone would give other weights if it were not exact
    again = (below, "model.gradient_checkpointing=true")
    run("tilt", family, tiny_pipeline, tmp_path / "parts", *again, "train.steps=1")
    parts = run("tilt", family, tiny_pipeline, tmp_path / "parts", *again, "run.resume=true")
    assert same(whole, parts)


@pytest.mark.parametrize("family", mostly_long(CASES, "chroma"))
def test_a_base_in_8_bits_and_embeddings_from_the_cache(
    tiny_pipeline: Tiny, tmp_path: Path, family: str
) -> None:
    more = ["model.base_storage=fp8", "model.gradient_checkpointing=true"]
    cache = f"data.cache={tmp_path / 'cache'}"
    first = run("cold_start", family, tiny_pipeline, tmp_path / "one", *more, cache)
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert kept
    times = [file.stat().st_mtime_ns for file in kept]
    shutil.rmtree(tmp_path / "one")
    assert same(first, run("cold_start", family, tiny_pipeline, tmp_path / "one", *more, cache))
    assert [file.stat().st_mtime_ns for file in kept] == times


@pytest.mark.long
@pytest.mark.parametrize("family", CASES)
def test_an_iteration_over_sizes_is_that_of_a_run_over_its_size(
    tiny_pipeline: Tiny, tmp_path: Path, family: str
) -> None:
    """Figures and the weights after it, bit for bit; of two sizes, whose levels differ where they
    go by the size. Stage 2 has stage 1's term in it, which two families are run on by itself."""
    sizes, below = "data.buckets=[[64, 96], 64]", [f"model.few_step={tmp_path / 'cold'}"]
    run("cold_start", family, tiny_pipeline, tmp_path / "cold", "train.steps=1")
    for stage in ("cold_start", "tilt") if family in ("sd3", "flux") else ("tilt",):

        def built(*more: str, stage: str = stage) -> Build:
            own = below if stage == "tilt" else []
            return build_stage(recipe(stage, family, tiny_pipeline, tmp_path / "x", *own, *more))

        for which, size in enumerate(("[64, 96]", "64")):
            mixed, alone = built(sizes), built(f"model.resolution={size}")
            over = mixed.running
            assert isinstance(over, Bucketed) and over.names == ("64x96", "64")
            steps = {over.drawn(step): step for step in range(20, -1, -1)}
            found, expected = (each.running.iteration(steps[which]) for each in (mixed, alone))
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            for role in ("generator", "fake_score"):
                after, theirs = (getattr(each.stage.roles, role).state() for each in (mixed, alone))
                assert same(after, theirs) and any(value.any() for value in after.values())
            assert mixed.facts.sizes == ((64, 96), 64) and alone.facts.sizes is None
