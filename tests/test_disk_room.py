"""Whether a run's checkpoints fit, told from the headers of the model's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from test_run_directory import start
from test_run_manifest import TILT, TINY

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import save_checkpoint
from tiltflow.setup.checks import check_run
from tiltflow.setup.disk_room import check_disk_room, kept_checkpoints, run_bytes


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def place(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "model")
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    return tmp_path


def written(run: Path) -> tuple[int, int]:
    """Bytes of a run's newest checkpoint and of its LoRA folders."""
    newest = max((run / "checkpoints").glob("step-*"))
    return (
        sum(file.stat().st_size for file in newest.iterdir()),
        sum(file.stat().st_size for file in (run / "export").rglob("*.safetensors")),
    )


SCORES = "train.fake_scores=per_boundary"


@pytest.mark.parametrize(
    "more",
    [(), (SCORES,), ("adapters.kind=copies",), ("adapters.rank=8",)],
    ids=["shared", "per boundary", "copies", "rank 8"],
)
def test_the_estimate_is_what_is_written(place: Path, more: tuple[str, ...]) -> None:
    more = (*more, "checkpoint.keep=1", "train.steps=4", "adapters.targets=[attn.to_q, attn.to_k]")
    every = "cold_start.generator_every=1"  # only what was stepped has moments
    runs = {"cold": ("sd3m_cold_start", *TINY, every), "tilt": ("sd3m_tilt", *TINY, *TILT)}
    if "adapters.kind=copies" in more:
        runs["tilt"] += ("tilt.fake_score_start=continued", "adapters.init_std=null")
    for name, given in runs.items():
        given = (*given, *more, f"run.out={name}")
        estimate = run_bytes(load_config(given[0], given[1:]))
        start(*given)
        checkpoint, export = written(place / name)
        # the files have headers and JSON besides; a copy has no buffers, which the estimate counts
        assert 0.4 < estimate / (2 * checkpoint + export) <= 1.2


def test_a_disk_without_the_room_is_refused_and_nothing_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config("sd3m_cold_start", [*TINY, "run.out=a/b", "train.steps=2"])
    needed = run_bytes(cfg)
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(0, 0, needed - 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(ValueError, match=r"run.out a/b: the disk has .* free, and 3 checkpoints"):
        check_run(cfg)
    assert asked == [place] and not (place / "a").exists()
    # what a run has written already is not needed again
    (place / "a" / "b" / "checkpoints").mkdir(parents=True)
    (place / "a" / "b" / "checkpoints" / "x").write_bytes(b"123")
    check_disk_room(cfg)


def test_what_cannot_be_known_passes(place: Path) -> None:
    mixture = load_config("mixture_cold_start", ["run.out=a"])
    hub = load_config("sd3m_cold_start", [*TINY, "model.path=organisation/name"])
    assert run_bytes(mixture) == run_bytes(hub) == 0
    check_disk_room(mixture)
    check_disk_room(hub)
    assert kept_checkpoints(mixture) == mixture.checkpoint.keep + 1


@pytest.mark.parametrize("stop", ["true", "false"])
def test_a_watch_keeps_its_last_good_checkpoint_whether_or_not_it_may_end_the_run(
    stop: str, tmp_path: Path
) -> None:
    more = ["model.few_step=x", "checkpoint.keep=1", "watch.rewards={linear: 1.0}"]
    watched = load_config("mixture_tilt", [*more, f"watch.stop={stop}", "rewards={'a:b': 1.0}"])
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {}, {}, keep=watched.checkpoint.keep, good=1)
    there = len(list((tmp_path / "checkpoints").glob("step-*")))
    assert there == 2 and kept_checkpoints(watched) == there + 1  # and the one in writing
