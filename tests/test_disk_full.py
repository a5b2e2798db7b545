"""A disk that is full from any one write of a run on: one sentence, and nothing saved is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from test_run_directory import mixture, weights

from tiltflow import disk, metrics
from tiltflow.checkpoint import latest_step


class Full:
    """Every way in which a run writes, failing from the n-th call on, as its writer reports it."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.count, self.at = 0, at
        rust = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        plain = OSError(errno.ENOSPC, "No space left on device")
        for owner, name, error in (
            (os, "write", plain),  # the lock
            (os, "fsync", plain),  # whatever is flushed
            (Path, "write_text", plain),
            (Path, "mkdir", plain),
            (disk, "save_file", rust),
            (metrics.MetricsLog, "write", plain),
        ):
            patch.setattr(owner, name, self.wrap(getattr(owner, name), error))

    def wrap(self, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= self.at:
                raise error
            return function(*args, **kwargs)

        return wrapped


def test_full_at_any_write_it_ends_in_a_sentence_and_goes_on_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = ("train.steps=4", "run.resume=auto")
    with monkeypatch.context() as patch:
        full = Full(patch, 10**9)
        mixture(tmp_path / "whole", *length)
    whole = weights(tmp_path / "whole")
    moments = sorted({1 + i * (full.count - 1) // 21 for i in range(22)})
    assert len(moments) >= 20
    saved = set()
    for at in moments:
        run = tmp_path / f"{at}"
        with monkeypatch.context() as patch:
            Full(patch, at)
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
