"""What a run says when memory or disk ends it, or when a checkpoint is torn or another run's."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import PLAIN, RUST, Full

from tiltflow.config.load import load_config
from tiltflow.core import checkpoint
from tiltflow.core.checkpoint import latest_step, load_checkpoint, save_checkpoint
from tiltflow.tasks.failures import explained, memory_advice, resume_command
from tiltflow.training.loop import LoopSettings, Skips, restore, train
from tiltflow.training.optim import Guard, NonFiniteError


def config(*overrides: str):
    return load_config("mixture_cold_start", ["run.device=cpu", *overrides])


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"w": torch.full((3,), value)}, "ema": {"w": torch.tensor(value)}}


WRITERS = (
    (checkpoint, "save_tensors", RUST),
    (checkpoint, "fsync", PLAIN),
    (Path, "write_text", PLAIN),
    (Path, "mkdir", PLAIN),
)
"""What a save writes with."""


def test_a_full_disk_at_any_write_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(f"run.out={tmp_path}")
    save_checkpoint(tmp_path, 10, tensors(1.0), {}, keep=2)
    failed = 0
    for at in range(2, 12):  # the first is the folder of all checkpoints, which exists
        with monkeypatch.context() as patch:
            Full(patch, at, WRITERS)
            try:
                with explained(cfg, 1):
                    save_checkpoint(tmp_path, 20, tensors(2.0), {}, keep=2)
                break
            except OSError as error:
                said = str(error)
        failed += 1
        found = load_checkpoint(tmp_path)
        assert found.step in (10, 20) and latest_step(tmp_path) == found.step
        assert float(found.tensors["ema"]["w"]) == found.step / 10
        assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
        assert "No space left on device" in said and f"go on from step {found.step}" in said
        if not (tmp_path / "checkpoints" / "step-000020").exists():
            assert (
                "checkpoint of step 20 was not written" in said and "step-000010 is whole" in said
            )
    assert failed > 6


def test_a_full_disk_at_the_metrics_is_explained_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiltflow.core import metrics

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run_loop(Stage(), tmp_path, 2)
    monkeypatch.setattr(metrics.MetricsLog, "write", full)
    match = "No space left on device .*; free some .* from step 2 with"
    with pytest.raises(OSError, match=match), explained(config(f"run.out={tmp_path}"), 1):
        run_loop(Stage(), tmp_path, 4, resume=True)
    assert load_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_suggests_settings(error: Exception) -> None:
    match = r"try train.micro_batch_size=256 \(now 512\)"
    with pytest.raises(MemoryError, match=match) as caught, explained(config(), 1):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_pass_unchanged() -> None:
    for error in (RuntimeError("something else"), ValueError("a"), OSError(errno.EACCES, "denied")):
        with pytest.raises(type(error)) as caught, explained(config(), 1):
            raise error
        assert caught.value is error


def test_memory_advice_is_of_what_can_still_be_lowered() -> None:
    cfg = load_config(
        "sd35m_tilt",
        ["model.path=x", "model.few_step=y", "data.prompts=z", "model.gradient_checkpointing=true",
         "train.micro_batch_size=1", "tilt.decode_chunk=4"],
    )  # fmt: skip
    chunk, base = "tilt.decode_chunk=2 (now 4)", "model.base_storage=fp8"
    assert memory_advice(cfg, 1) == f"try {chunk}, {base}"
    assert memory_advice(cfg, 2) == f"try {chunk}, run.sharding=fsdp2, {base}"
    cold = ["model.path=x", "data.prompts=z", "train.micro_batch_size=1", "model.base_storage=fp8",
            "model.gradient_checkpointing=[generator, fake_score]"]  # fmt: skip
    kept = load_config(
        "sd35m_cold_start", [*cold, "cold_start.fresh_boundary=false", "cold_start.keep_graph=true"]
    )
    assert memory_advice(kept, 1) == "try cold_start.keep_graph=false"
    assert memory_advice(load_config("sd35m_cold_start", cold), 1).startswith("every setting")
    least = config("train.batch_size=1", "model.dtype=bf16")
    assert memory_advice(least, 1).startswith(
        "every setting that needs less memory is at its least"
    )


def test_resume_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert resume_command(Path("a"), 1) == "tiltflow train a/config.yaml run.resume=true"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resume_command(Path("a"), 16).startswith("torchrun --nproc-per-node 8 -m tiltflow train")


class Stage:
    """The least that the loop runs: it fails at the given steps."""

    def __init__(self, fail: tuple[int, ...] = ()) -> None:
        self.roles, self.updaters, self.fail, self.ran = self, {}, fail, []
        self.guard, self.frozen = Guard(), {}

    def iteration(self, step: int) -> dict[str, torch.Tensor]:
        self.ran.append(step)
        if step in self.fail:
            raise NonFiniteError(f"step {step}: the loss is nan")
        return {"loss": torch.tensor(1.0)}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"generator": {"w": torch.zeros(1)}}

    def load(self, state: Any) -> None:
        self.loaded = state["generator"]


def settings(steps: int, **values: Any) -> LoopSettings:
    return LoopSettings(steps=steps, log_every=1, save_every=1, **values)


def run_loop(stage: Stage, run: Path, steps: int, resume: bool = False, **values: Any) -> int:
    from tiltflow.training.loop import Hooks

    return train(stage, run, settings(steps, **values), Hooks(), resume)


def test_skips_are_bounded_counted_and_remembered(tmp_path: Path) -> None:
    run_loop(Stage(fail=(1,)), tmp_path, 3, skip=2)
    assert load_checkpoint(tmp_path).state["skipped"] == 1
    run_loop(Stage(fail=(3,)), tmp_path, 4, resume=True, skip=2)
    assert load_checkpoint(tmp_path).state["skipped"] == 2
    with pytest.raises(NonFiniteError, match="step 5"):
        run_loop(Stage(fail=(5,)), tmp_path, 8, resume=True, skip=2)
    assert latest_step(tmp_path) == 5
    with pytest.raises(NonFiniteError, match="step 0"):
        run_loop(Stage(fail=(0,)), tmp_path / "strict", 2)


def test_a_torn_checkpoint_is_named_and_an_earlier_one_used_on_request(tmp_path: Path) -> None:
    run_loop(Stage(), tmp_path, 3)
    (tmp_path / "checkpoints" / "step-000003" / "generator.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"step-000003 is torn.*step-000002 is whole.*resume_from"):
        run_loop(Stage(), tmp_path, 5, resume=True)
    stage = Stage()
    assert run_loop(stage, tmp_path, 5, resume=True, resume_from="step-000002") == 5
    assert stage.ran == [2, 3, 4] and latest_step(tmp_path) == 5
    with pytest.raises(ValueError, match="resume_from step-000002 is given, but run.resume is fa"):
        config("run.resume_from=step-000002")


def test_a_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    facts = {"stage": "tilt", "adapters": {"rank": 4}}
    save_checkpoint(tmp_path, 7, {"generator": {"w": torch.zeros(1)}}, facts, keep=1)
    found = load_checkpoint(tmp_path)
    for here, message in (
        ({"stage": "cold_start"}, "step-000007 is not of this run: its stage is tilt, but here"),
        ({"stage": "tilt", "adapters": {"rank": 8}}, r"its adapters is \{'rank': 4\}, but here"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(Stage(), found, settings(1, facts=here), Skips(0))
    stage = Stage()
    role = SimpleNamespace(name="generator")
    stage.updaters = {"generator": SimpleNamespace(load=lambda tensors: None, role=role)}
    with pytest.raises(ValueError, match="step-000007 is not of this run: it lacks 'optimizer_gen"):
        restore(stage, found, settings(1, facts=facts), Skips(0))


def test_the_config_of_a_run_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiltflow.tasks.train import _write_config

    once = ("run.resume=true", "run.resume_from=step-000002", "run.replan=true")
    _write_config(config(*once), tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    assert "resume_from: latest" in before  # and not this checkpoint again, at the next resume
    assert "replan: false" in before  # nor yet another plan, without a word, on a smaller device

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        _write_config(config("train.steps=3"), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before
    shutil.rmtree(tmp_path)
