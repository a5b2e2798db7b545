"""Two ranks, and two that share the base, equal one rank: both stages of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families_table import CASES
from test_distributed import Runner, gap, run, server  # noqa: F401
from test_distributed import home as home
from test_families_training import recipe

from tiltflow.config.load import dump_config
from tiltflow.core.metrics import read_metrics

Tiny = Callable[[str], Path]
WAYS = {"one": (1, []), "two": (2, []), "sharded": (2, ["run.sharding=fsdp2"])}
REPLICATED = ("sd3", "z_image", "wan")
"""Families that are run on two whole copies too; shards pad and average by the same code."""
SLOWLY = ["train.generator_lr=1e-4", "train.fake_score_lr=1e-4", "log.every=1", "adapters.rank=4"]


@pytest.mark.long
@pytest.mark.parametrize("family", CASES)
def test_ranks_and_a_shared_base_equal_one(
    tiny_pipeline: Tiny,
    run: Runner,  # noqa: F811
    tmp_path: Path,
    family: str,
) -> None:
    """Prompts of different lengths, so that each rank has its own padding."""
    below: list[str] = []
    for stage in ("cold_start", "tilt"):
        place = tmp_path / f"{stage}.yaml"
        more = [*SLOWLY, "model.gradient_checkpointing=true", *below]
        cfg = recipe(stage, family, tiny_pipeline, tmp_path / "run", *more)
        place.write_text(dump_config(cfg))
        made = {
            way: run(f"{family}_{stage}_{way}", str(place), size, *options)
            for way, (size, options) in WAYS.items()
            if way != "two" or family in REPLICATED
        }
        lines = read_metrics(made["one"] / "metrics.jsonl")
        for way in made.keys() - {"one"}:
            off = gap(made[way], made["one"])
            assert off < 1e-4, (stage, way, off)
            rows = read_metrics(made[way] / "metrics.jsonl")
            for row, expected in zip(rows, lines, strict=True):
                assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        below = [f"model.few_step={made['one']}"]
