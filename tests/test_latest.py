"""Which checkpoint is the latest: a file says so, and copies that lost it are read all the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiltflow.core import checkpoint, latest
from tiltflow.core.checkpoint import latest_step, load_checkpoint, point_latest, save_checkpoint


def save(run: Path, step: int, keep: int = 2) -> None:
    save_checkpoint(run, step, {"ema": {"w": torch.tensor(float(step))}}, {"step": step}, keep)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def pointer(run: Path) -> Path:
    return run / "checkpoints" / "latest"


def link(run: Path) -> None:
    """As earlier versions left it."""
    pointer(run).unlink()
    os.symlink("step-000004", pointer(run))


def dereferenced(run: Path) -> None:
    """As `cp -rL` leaves what earlier versions made."""
    pointer(run).unlink()
    shutil.copytree(run / "checkpoints" / "step-000004", pointer(run))


def text_of(text: bytes) -> Callable[[Path], None]:
    return lambda run: void(pointer(run).write_bytes(text))


def void(_: object) -> None:
    """Nothing of what was given."""


FORMS = {
    "a link": link,
    "a directory": dereferenced,
    "nothing": lambda run: pointer(run).unlink(),
    "an empty file": text_of(b""),
    "a torn file": text_of(b"step-00"),
    "another program's file": text_of(b"\x80 something\n" * 9),
    "a path out of the folder": text_of(b"../../elsewhere/step-000004"),
    "a link elsewhere": lambda run: (pointer(run).unlink(), os.symlink("/dev/zero", pointer(run))),
    "an empty directory": lambda run: (pointer(run).unlink(), pointer(run).mkdir()),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_latest_is_read_and_replaced_by_the_next_save(run: Path, form: str) -> None:
    FORMS[form](run)
    assert latest_step(run) == 4 and load_checkpoint(run).step == 4
    save(run, 6)
    assert pointer(run).read_text() == "step-000006\n" and not pointer(run).is_symlink()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step-000004", "step-000006"} and load_checkpoint(run).step == 6


def test_a_directory_says_by_its_manifest_which_step_it_is_a_copy_of(run: Path) -> None:
    """A run that its watch ended points at an earlier one than the newest."""
    dereferenced(run)
    save(run, 6, keep=3)
    assert point_latest(run, 4) == 4
    pointer(run).unlink()
    shutil.copytree(run / "checkpoints" / "step-000004", pointer(run))
    assert latest_step(run) == 4
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert latest_step(run) == 6  # what it was a copy of is gone


def test_without_a_pointer_the_newest_whole_one_is_taken(run: Path) -> None:
    pointer(run).unlink()
    (run / "checkpoints" / "step-000004" / "ema.safetensors").write_bytes(b"torn")
    assert latest_step(run) == 2 and load_checkpoint(run).step == 2
    (run / "checkpoints" / "step-000002" / "state.json").unlink()
    # none is whole: the run is there all the same, and the error names it
    assert latest_step(run) == 4
    with pytest.raises(ValueError, match=r"step-000004 is torn: ema\S+ does not match .* no whole"):
        load_checkpoint(run)


class Bomb:
    """Ends the process at the n-th call of what it wraps."""

    def __init__(self, at: int) -> None:
        self.left = at

    def wrap(self, function: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("form", ["a link", "a directory", "nothing"])
def test_a_kill_while_the_pointer_is_replaced_loses_nothing(
    run: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMS[form](run)
    for at in range(1, 20):
        copy = shutil.copytree(run, run.with_name(f"copy{at}"), symlinks=True)
        bomb = Bomb(at)
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (shutil, "rmtree"), (latest, "fsync")):
                patch.setattr(owner, name, bomb.wrap(getattr(owner, name)))
            try:
                save(copy, 6)
            except KeyboardInterrupt:
                assert load_checkpoint(copy).step in (4, 6)
            else:
                assert at > 5
                return
    raise AssertionError("the save never came to its end")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert load_checkpoint(tmp_path).step == 3


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_nested_too_deeply_is_one_sentence(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-000004"
    (path / name).write_text(DEEP)
    manifest = path / "manifest.json"
    if name == "state.json":
        whole = json.loads(manifest.read_text())
        whole["files"][name] = checkpoint.sha256(path / name)
        manifest.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"step-000004 is (torn|not tiltflow's)"):
        load_checkpoint(run)


def test_an_optimizer_state_that_lacks_a_moment_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    saved = checkpoint.optimizer_tensors(optimizer, ["w"])
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        lacking = {name: value for name, value in saved.items() if name != f"{kind}.w"}
        with pytest.raises(ValueError, match=f"state of 'w' lacks {kind}"):
            checkpoint.load_optimizer_tensors(optimizer, ["w"], lacking)
    with pytest.raises(ValueError, match="has momentum, which AdamW does not know"):
        checkpoint.load_optimizer_tensors(optimizer, ["w"], saved | {"momentum.w": torch.ones(2)})
