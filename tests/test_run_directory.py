"""A run directory that is resumed, moved, copied, mistaken for another, or begun twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint, sha256
from tiltflow.core.metrics import read_metrics
from tiltflow.core.run_lock import RunLock
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.tasks.train import run_training

SRC = Path(__file__).parents[1] / "src"
SMALL = (
    "run.device=cpu", "train.batch_size=8", "checkpoint.every=2", "log.every=1", "train.warmup=9",
    "cold_start.generator_every=2",
)  # fmt: skip


def start(recipe: str, *overrides: str) -> str:
    """Runs a recipe; what it says."""
    said = StringIO()
    run_training(load_config(recipe, overrides), Console(file=said, width=1000))
    return said.getvalue()


def mixture(out: Path, *more: str) -> str:
    return start("mixture_cold_start", *SMALL, f"run.out={out}", *more)


def weights(run: Path) -> dict[str, str]:
    return {g: adapter_fingerprint(table) for g, table in load_checkpoint(run).tensors.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    mixture(out, "train.steps=6")
    return out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, for tests to copy."""
    out = tmp_path_factory.mktemp("begun") / "run"
    mixture(out, "train.steps=4")
    return out


@pytest.fixture
def half(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "a", symlinks=True)


def link_latest(run: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step-000004")


def moved(run: Path) -> Path:
    return run.rename(run.with_name("b"))


def copied(run: Path) -> Path:
    return shutil.copytree(run, run.with_name("b"), symlinks=True)


def dereferenced(run: Path) -> Path:
    """`cp -rL` of what earlier versions made."""
    link_latest(run)
    return shutil.copytree(run, run.with_name("b"))


def zipped(run: Path) -> Path:
    archive = run.with_name("a.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(run.rglob("*")):
            file.write(path, path.relative_to(run))
    with zipfile.ZipFile(archive) as file:
        file.extractall(run.with_name("b"))
    return run.with_name("b")


def without_latest(run: Path) -> Path:
    (run / "checkpoints" / "latest").unlink()
    return run


@pytest.mark.parametrize("how", [moved, copied, dereferenced, zipped, without_latest])
def test_wherever_it_was_carried_it_goes_on_there_bit_equal(
    how: Callable[[Path], Path], half: Path, whole: Path
) -> None:
    there = how(half)
    start(str(there / "config.yaml"), "run.resume=true", "train.steps=6")
    assert weights(there) == weights(whole)
    assert read_metrics(there / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    assert (there / "checkpoints" / "latest").read_text() == "step-000006\n"
    assert half == there or not half.exists() or latest_step(half) == 4


def test_without_links_it_goes_on_too(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(95, "Operation not supported")

    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, refuse)
    mixture(tmp_path / "a", "train.steps=4")
    mixture(tmp_path / "a", "train.steps=6", "run.resume=true")
    assert weights(tmp_path / "a") == weights(whole)


def test_an_override_still_says_where(half: Path, tmp_path: Path) -> None:
    config = str(half / "config.yaml")
    assert load_config(config).run.out == str(half)
    assert load_config(config, ["run.out=elsewhere"]).run.out == "elsewhere"
    plain = shutil.copy(config, tmp_path / "config.yaml")  # a recipe: no run lies beside it
    assert load_config(str(plain)).run.out != str(tmp_path)


def test_a_run_that_lost_its_pointer_is_not_begun_anew(half: Path) -> None:
    without_latest(half)
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    with pytest.raises(ValueError, match="already holds a run at step 4"):
        mixture(half, "train.steps=3")
    assert before == {path: path.stat().st_mtime_ns for path in half.rglob("*")}


@pytest.mark.parametrize("resume", ["run.resume=true", "run.resume_from=step-000002"])
def test_nothing_to_resume_is_an_error(tmp_path: Path, resume: str) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume in|there is no step-000002 in .*typo"):
        mixture(tmp_path / "typo", resume, "run.resume=true")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_there_is_an_error(half: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no step-000009 in \S+, its latest is step 4"):
        mixture(half, "run.resume=true", "run.resume_from=step-000009")


def test_resume_auto_begins_and_goes_on(tmp_path: Path, whole: Path) -> None:
    mixture(tmp_path / "a", "train.steps=4", "run.resume=auto")
    mixture(tmp_path / "a", "train.steps=6", "run.resume=auto")
    assert weights(tmp_path / "a") == weights(whole)
    with pytest.raises(ValueError, match="run.resume is 'maybe', but it should be true, false or"):
        mixture(tmp_path / "a", "run.resume=maybe")


def test_ended_before_its_first_save_it_begins_again_and_without_checkpoints_it_does_not(
    half: Path, whole: Path
) -> None:
    shutil.rmtree(half / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint to resume from, though its log reaches st"):
        start(str(half / "config.yaml"), "run.resume=true")
    log = (half / "metrics.jsonl").read_bytes()
    (half / "checkpoints" / "latest").mkdir(parents=True)  # all that some copies leave of a link
    with pytest.raises(ValueError, match="no checkpoint to resume from, though its log reaches st"):
        mixture(half, "train.steps=3")
    assert (half / "metrics.jsonl").read_bytes() == log
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:2]))  # killed in its first save
    start(str(half / "config.yaml"), "run.resume=true", "train.steps=6")
    assert weights(half) == weights(whole)


def test_going_on_is_not_asked_for_again_by_the_config(half: Path) -> None:
    mixture(half, "run.resume=true", "train.steps=4")
    assert load_config(str(half / "config.yaml")).run.resume is False


def test_what_has_changed_is_said_and_logged(half: Path) -> None:
    said = mixture(
        half, "run.resume=true", "train.steps=6", "train.generator_lr=0.01", "train.ema=0.5"
    )
    assert "changed since step 4: train.steps 4 → 6, train.generator_lr " in said
    assert said.count("changed since") == 1 and "→ 0.01, train.ema 0.9" in said
    rows = read_metrics(half / "metrics.jsonl")
    (row,) = [row for row in rows if "changed" in row]
    assert row["step"] == 4 and row["changed"].startswith("train.generator_lr ")
    assert "train.steps" not in row["changed"]  # so far all was warm-up, whatever its length
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6]
    said = mixture(half, "run.resume=true", "train.steps=8", "train.warmup=0", "train.ema=0.5")
    assert "train.steps 6 → 8" in read_metrics(half / "metrics.jsonl")[7]["changed"], said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.seed=1", "its run.seed is 0, but here it is 1"),
        ("sampler.steps=3", "its sampler.steps is 4, but here it is 3"),
    ],
)
def test_another_run_s_settings_are_refused_and_nothing_is_written(
    half: Path, change: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"step-000004 is not of this run: {message}"):
        mixture(half, "run.resume=true", "train.steps=6", change)
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def edit_state(run: Path, change: Callable[[dict], object]) -> None:
    path = run / "checkpoints" / "step-000004"
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = sha256(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_without_a_manifest_goes_on_and_says_so(half: Path, whole: Path) -> None:
    """As earlier versions made it, with a link besides."""
    link_latest(half)
    edit_state(half, lambda state: state.pop("manifest"))
    said = mixture(half, "run.resume=true", "train.steps=6")
    assert "step-000004 is of a version that kept no manifest" in said
    assert weights(half) == weights(whole)
    assert read_metrics(half / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("skipped", None, "its skipped is None, which is no count"),
        ("skipped", -1, "its skipped is -1"),
        ("manifest", [], "its manifest is no JSON object"),
        ("manifest", {"config": {}}, "its run.seed is null, but here it is 0"),
        ("stage", {}, "its stage is {}, but here it is cold_start"),
    ],
)
def test_a_state_of_the_wrong_kind_is_one_sentence(
    half: Path, key: str, value: object, message: str
) -> None:
    edit_state(half, lambda state: state.update({key: value}))
    with pytest.raises(ValueError, match=message):
        mixture(half, "run.resume=true", "train.steps=6")


def test_a_second_run_in_the_directory_is_refused_before_anything_is_read(half: Path) -> None:
    with RunLock(half):
        for more in ((), ("run.resume=true",), ("data.prompts=nowhere.txt",)):
            with pytest.raises(ValueError, match=rf"in by process {os.getpid()} on host"):
                mixture(half, "train.steps=6", *more)
    assert latest_step(half) == 4


def test_the_lock_is_gone_after_a_run_and_after_a_failed_one(half: Path, tmp_path: Path) -> None:
    assert not (half / "run.lock").exists()
    with pytest.raises(ValueError):
        mixture(half, "run.resume=true", "run.seed=1")
    assert not (half / "run.lock").exists()


def test_a_lock_that_was_lost_ends_the_run_before_it_saves(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiltflow.training import loop

    real = loop.Skips.iteration

    def robbed(self: loop.Skips, *args: object) -> dict[str, torch.Tensor]:
        (half / "run.lock").unlink(missing_ok=True)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.Skips, "iteration", robbed)
    with pytest.raises(ValueError, match=r"has lost the lock .* so it saves nothing more"):
        mixture(half, "run.resume=true", "train.steps=8")
    assert latest_step(half) == 4


def test_a_resume_command_with_spaces_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    from tiltflow.tasks.failures import resume_command

    command = resume_command(tmp_path / "a [b]'s run", 1)
    told = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True)
    assert told.stdout.splitlines()[2] == str(tmp_path / "a [b]'s run" / "config.yaml")


def test_a_signal_is_answered_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom tiltflow.core.interruption import STOPPING, interruptible\n"
        "with interruptible(STOPPING) as stopped:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stopped.is_set()\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert told.stderr == (
        "tiltflow: the step is finished and saved before the run stops (again: stop at once)\n"
    )
