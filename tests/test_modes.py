"""What a run leaves behind may be read by whom its neighbours may be read by."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train import recipe

from tiltflow.config.load import load_config
from tiltflow.core.disk import save_tensors
from tiltflow.tasks.train import run_training


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_tensors_have_the_mode_of_a_new_file(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.ones(2)}, path, {"format": "pt"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert torch.equal(load_file(path)["a"], torch.ones(2))


def test_checkpoints_and_cached_prompts_have_one_mode(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a cat\n")
        settings = recipe("cold_start", tiny_pipeline("sd35m"), prompts, tmp_path / "run")
        more = ["train.steps=1", "log.samples_every=0", "train.batch_size=2"]
        more += [f"data.cache={tmp_path / 'cache'}"]
        run_training(load_config("demo_cold_start", [*settings, *more]), Console(quiet=True))
    finally:
        os.umask(before)
    files = [*(tmp_path / "run" / "checkpoints").rglob("*"), *(tmp_path / "cache").rglob("*")]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files if file.is_file()}
    assert modes == {0o644}
    assert {file.suffix for file in files} >= {".safetensors", ".json"}
