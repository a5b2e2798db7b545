"""A disk that is full from any one write of a run on: one sentence, and nothing saved is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from full_disk import PLAIN, RUST, Full
from test_run_directory import mixture, weights

from tiltflow.core import disk, metrics
from tiltflow.core.checkpoint import latest_step

WRITERS = (
    (os, "write", PLAIN),  # the lock
    (os, "fsync", PLAIN),  # whatever is flushed
    (Path, "write_text", PLAIN),
    (Path, "mkdir", PLAIN),
    (disk, "save_file", RUST),
    (metrics.MetricsLog, "write", PLAIN),
)
"""Every way in which a run writes."""


@pytest.mark.long
def test_full_at_any_write_it_ends_in_a_sentence_and_goes_on_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = ("train.steps=4", "run.resume=auto")
    with monkeypatch.context() as patch:
        full = Full(patch, 10**9, WRITERS)
        mixture(tmp_path / "whole", *length)
    whole = weights(tmp_path / "whole")
    moments = sorted({1 + i * (full.count - 1) // 21 for i in range(22)})
    assert len(moments) >= 20
    saved = set()
    for at in moments:
        run = tmp_path / f"{at}"
        with monkeypatch.context() as patch:
            Full(patch, at, WRITERS)
            with pytest.raises(OSError, match="No space left on device") as caught:
                mixture(run, *length)
        step = latest_step(run)
        said = "nothing was saved yet" if step is None else f"go on from step {step} with"
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert not (run / "run.lock").exists()
        mixture(run, *length)
        assert weights(run) == whole
        saved.add(step)
    assert saved == {None, 2, 4}
