"""Kills of stage 2 on the embedded pipeline, whose reward is its CLIP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_stage_two_with_a_clip_reward_killed_at_random_moments_ends_bit_equal(
    tmp_path: Path,
) -> None:
    """The short form of `benchmarks/kill_resume.py --model embedded`."""
    script = ROOT / "benchmarks" / "kill_resume.py"
    options = ["--model", "embedded", "--stage", "tilt", "--kills", "2", "--json"]
    subprocess.run(
        [sys.executable, script, *options, tmp_path / "kills.json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == found["bit_equal"] == 2
    assert found["during_save"] >= 1  # one is aimed at one; the other may come in one by chance
