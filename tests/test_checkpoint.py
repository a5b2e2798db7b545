"""Round trips, and kills at every stage of a save."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiltflow.core import checkpoint, latest
from tiltflow.core.checkpoint import (
    latest_step,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)


class Killed(BaseException):
    """Stands for the process's end: nothing in the package catches it."""


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"w": torch.full((2, 3), value)}, "ema": {"w": torch.tensor(value)}}


def save(run: Path, step: int, value: float | None = None, keep: int = 3) -> Path:
    value = float(step) if value is None else value
    return save_checkpoint(run, step, groups(value), {"step": step}, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": {"bf16": torch.randn(3, dtype=torch.bfloat16), "t": base.T, "part": base[0]},
        "tied": {"x": base, "y": base},
        "scalar": {"step": torch.tensor(7)},
        "empty": {},
    }
    state = {"best": 0.1, "names": ["é", "b"], "nothing": None}
    path = save_checkpoint(tmp_path, 12, tensors, state, keep=1)
    assert path == tmp_path / "checkpoints" / "step-000012"
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 12 == latest_step(tmp_path)
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for group, values in tensors.items():
        assert loaded.tensors[group].keys() == values.keys()
        for name, value in values.items():
            got = loaded.tensors[group][name]
            assert got.dtype == value.dtype and torch.equal(got, value)


def test_latest_is_a_file_and_moves(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    assert not pointer.is_symlink() and pointer.read_text() == "step-000002\n"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert load_checkpoint(tmp_path / "moved").step == 2
    assert load_checkpoint(tmp_path / "moved", "step-000001").state == {"step": 1}


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    with pytest.raises(ValueError, match="latest does not exist; there is no whole checkpoint"):
        load_checkpoint(tmp_path)


def test_retention_keeps_the_newest_and_what_latest_points_at(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step-000003", "step-000004"]
    save(tmp_path, 2, keep=3)
    save(tmp_path, 1, keep=2)
    assert names(tmp_path) == ["latest", "step-000001", "step-000004"]
    assert latest_step(tmp_path) == 1


def test_a_branch_that_was_left_is_older_than_the_one_that_goes_on(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=4)
    save(tmp_path, 3, keep=4)  # gone on from step 2
    assert names(tmp_path) == ["latest", "step-000002", "step-000003", "step-000006", "step-000008"]
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["latest", "step-000003", "step-000005"]
    save(tmp_path, 1_000_000, keep=2)
    assert names(tmp_path) == ["latest", "step-000005", "step-1000000"]


def test_saving_the_same_again_leaves_it_alone(tmp_path: Path) -> None:
    before = (save(tmp_path, 5) / "generator.safetensors").stat().st_ino
    assert (save(tmp_path, 5) / "generator.safetensors").stat().st_ino == before
    assert names(tmp_path) == ["latest", "step-000005"]


def test_saving_other_content_replaces(tmp_path: Path) -> None:
    save(tmp_path, 5, 1.0)
    save(tmp_path, 5, 2.0)
    assert float(load_checkpoint(tmp_path).tensors["ema"]["w"]) == 2.0
    assert names(tmp_path) == ["latest", "step-000005"]


class Bomb:
    """Kills the process at the n-th call that changes the disk, counted over several functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.count, self.at = 0, at
        for owner, name in (
            (checkpoint, "save_tensors"),
            (checkpoint, "fsync"),
            (latest, "fsync"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (os, "replace"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise Killed
            return function(*args, **kwargs)

        return wrapped


def count_stages(run: Path, step: int, value: float, keep: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        bomb = Bomb(patch)
        save(run, step, value, keep)
        return bomb.count


@pytest.mark.parametrize(("step", "keep"), [(20, 2), (10, 2), (20, 1)])
def test_a_kill_at_any_stage_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, keep: int
) -> None:
    """A new step, the same step with other content, and one that drops the old one."""
    save(tmp_path / "dry", 10, 1.0)
    stages = count_stages(tmp_path / "dry", step, 2.0, keep)
    assert stages > 10
    for at in range(1, stages + 1):
        run = tmp_path / f"{at}"
        save(run, 10, 1.0)
        with monkeypatch.context() as patch:
            Bomb(patch, at)
            with pytest.raises(Killed):
                save(run, step, 2.0, keep)
        # What a new process finds: the old one or the new one, whole, and which of them it says.
        loaded = load_checkpoint(run)
        value = float(loaded.tensors["ema"]["w"])
        assert (loaded.step, value) in {(10, 1.0), (step, 2.0)}
        assert loaded.step == latest_step(run) == loaded.state["step"]
        assert not any(name.startswith(".") for name in names(run))
        save(run, step, 2.0, keep)
        assert load_checkpoint(run).step == step
        assert float(load_checkpoint(run).tensors["ema"]["w"]) == 2.0


def test_what_a_live_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    alive = folder / f".tmp-{os.getppid()}-step-000002"
    dead = folder / ".tmp-999999999-step-000002"
    alive.mkdir()
    dead.mkdir()
    load_checkpoint(tmp_path)
    assert alive.exists() and not dead.exists()


def test_several_readers_may_tidy_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ranks of a stage 2 whose stage 1 was killed in a save. Another is always first."""
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    whole = folder / "step-000001"
    os.replace(whole, folder / ".old-999999999-step-000001")
    (folder / ".tmp-999999999-step-000002").mkdir()
    (folder / ".tmp-999999999-latest").touch()
    turns = 0

    def another_first(pid: int) -> bool:
        nonlocal turns
        turns += 1
        if turns <= 3:
            checkpoint._sweep(folder)
        return False

    monkeypatch.setattr(checkpoint, "at_work", another_first)
    assert load_checkpoint(tmp_path).step == 1 and turns > 3
    assert names(tmp_path) == ["latest", "step-000001"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip_a_byte(p / "ema.safetensors"), "ema.safetensors does not match its check"),
        (lambda p: (p / "ema.safetensors").unlink(), "is torn: ema.safetensors is missing"),
        (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda p: (p / "manifest.json").write_text("{}"), "is not tiltflow's"),
        (lambda p: flip_a_byte(p / "state.json"), "state.json does not match its checksum"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_a_whole_one(
    tmp_path: Path, damage: Any, message: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "checkpoints" / "step-000002")
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value).endswith("step-000001 is whole")
    assert "step-000002" in str(caught.value) and "\n" not in str(caught.value)


def test_manifests_cannot_point_elsewhere_and_steps_cannot_be_renamed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shutil.copytree(path, path.with_name("step-000009"))
    with pytest.raises(ValueError, match="was renamed: its manifest says step 1"):
        load_checkpoint(tmp_path, "step-000009")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = "0"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="names the file '../../secret'"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is not called latest or step-XXXXXX"):
        load_checkpoint(tmp_path, "../elsewhere")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"step": -1}, "step -1"),
        ({"keep": 0}, "keeping 0"),
        ({"tensors": {"a/b": {}}}, "'a/b' is no file name"),
        ({"state": {"x": float("nan")}}, "JSON cannot hold the state"),
        ({"state": {"x": torch.zeros(1)}}, "JSON cannot hold the state"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, kwargs: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"step": 1, "tensors": {}, "state": {}, "keep": 1}
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, **(arguments | kwargs))
    assert list(tmp_path.iterdir()) == []


def trained(steps: int, lr: float = 0.1) -> tuple[nn.Module, torch.optim.AdamW, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    train(model, optimizer, steps)
    return model, optimizer, [name for name, _ in model.named_parameters()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_optimizer_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, keys = trained(3)
    saved = {"optimizer": optimizer_tensors(optimizer, keys), "model": model.state_dict()}
    assert set(saved["optimizer"]) == {
        f"{kind}.{key}" for kind in ("step", "exp_avg", "exp_avg_sq") for key in keys
    }
    save_checkpoint(tmp_path, 3, saved, {}, keep=1)
    train(model, optimizer, 4)

    again, other, _ = trained(0)
    loaded = load_checkpoint(tmp_path).tensors
    untouched = {key: value.clone() for key, value in loaded["optimizer"].items()}
    again.load_state_dict(loaded["model"])
    load_optimizer_tensors(other, keys, loaded["optimizer"])
    train(again, other, 4)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for key, value in optimizer_tensors(optimizer, keys).items():
        assert torch.equal(value, optimizer_tensors(other, keys)[key])
    assert all(torch.equal(untouched[key], loaded["optimizer"][key]) for key in untouched)


def test_optimizer_state_that_is_absent_stays_absent_and_rates_stay() -> None:
    _, fresh, keys = trained(0)
    assert optimizer_tensors(fresh, keys) == {}
    _, used, _ = trained(2, lr=0.5)
    load_optimizer_tensors(used, keys, {})
    assert optimizer_tensors(used, keys) == {}
    assert used.param_groups[0]["lr"] == 0.5


def test_optimizer_state_of_another_model_is_refused() -> None:
    _, optimizer, keys = trained(1)
    saved = optimizer_tensors(optimizer, keys)
    with pytest.raises(ValueError, match=r"'exp_avg\.other' belongs to no parameter"):
        load_optimizer_tensors(optimizer, keys, {"exp_avg.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has shape \(3,\), not \(4, 3\)"):
        load_optimizer_tensors(optimizer, keys, saved | {"exp_avg.0.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="has 4 parameters, but 1 distinct names"):
        optimizer_tensors(optimizer, ["one"])
