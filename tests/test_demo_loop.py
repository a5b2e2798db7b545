"""`tiltflow demo --loop`: two rounds of votes, fits and tilts, and nothing made twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tiltflow.data.preferences import load_preferences
from tiltflow.tasks import loop
from tiltflow.tasks.demo import train_stage
from tiltflow.tasks.run import Run

SMALL = loop.Size(votes=(56, 34), weights=(0.6, 0.2), steps=(2, 3), batch=8, held_out=8)


@pytest.mark.long
def test_the_second_round_asks_about_the_first_tilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def short(
        stage: str, out: Path, changes: Sequence[str], console: Console, *folder: Any
    ) -> None:
        steps = ("train.steps=6", "watch.every=6") if stage == "cold_start" else ()
        trained.append(stage)
        train_stage(stage, out, (*changes, *steps), console, *folder)

    monkeypatch.setattr(loop, "train_stage", short)
    monkeypatch.setattr(loop, "NOISE", 0.0)
    console = Console(quiet=True)
    found = loop.run_loop(tmp_path, console, SMALL)
    assert trained == ["cold_start", "tilt", "tilt"] and found["votes"] == 90
    place = tmp_path / "loop"
    assert json.loads((place / "loop.json").read_text()) == found
    first, second = (load_preferences(folder / loop.VOTES) for folder in (place / "first", place))
    assert (len(first), len(second)) == (56, 34)
    facts = [
        json.loads((p / "taste" / "reward.json").read_text()) for p in (place / "first", place)
    ]
    assert [about["choices"] for about in facts] == [56, 90]
    runs = [Run(place / "first" / "tilt"), Run(place / "tilt")]
    assert [run.step for run in runs] == [2, 3]
    assert [(run.path / "watch.jsonl").is_file() for run in runs] == [False, True]
    weights = [run.config.rewards[str(run.path.parent / "taste")].weight for run in runs]
    assert weights == [0.6, 0.2]
    # from one noise: close, and not the same, while the first round's pairs are of two noises
    apart = [max(float((a - b).abs().mean()) for a, b in (one.images() for one in votes[:20]))
             for votes in (first, second)]  # fmt: skip
    assert 0 < apart[1] < apart[0]
    before = (place / loop.VOTES).stat().st_mtime_ns
    again = loop.run_loop(tmp_path, console, SMALL)
    assert again | {"minutes": 0} == found | {"minutes": 0}
    assert (place / loop.VOTES).stat().st_mtime_ns == before
