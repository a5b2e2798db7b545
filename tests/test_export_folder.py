"""The folder of an export: replaced as a whole or left as it was, and nobody else's overwritten."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from students import MERGED, Student, student

from tiltflow.config.load import load_config
from tiltflow.formats import writing as writer
from tiltflow.formats.folder import check_export_folder, replacing
from tiltflow.formats.wanted import Wanted
from tiltflow.scheduler import CPSFlowMatchScheduler
from tiltflow.setup.checks import check_export
from tiltflow.tasks import export as command
from tiltflow.tasks.export import export_checkpoint

Tiny = Callable[[str], Path]


def content(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    return student(tiny_pipeline, "sd3m", tmp_path_factory.mktemp("made"), formats=MERGED)


@pytest.fixture
def used(made: Student, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.export, tmp_path / "export"))


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]


def test_an_old_export_leaves_nothing_beside_the_new_one(made: Student, used: Path) -> None:
    assert {"tilt", "merged"} <= {p.name for p in used.iterdir()}
    first = made.checkpoint
    facts = {"stage": "cold_start", "adapters": first.state["adapters"]}
    stage_1 = type(first)(2, {"ema": first.tensors["few_step"]}, facts)
    config = made.config.model_copy(update={"stage": "cold_start"})
    paths = export_checkpoint(config, stage_1, used)
    assert all(path.exists() and path.is_relative_to(used) for path in paths)
    assert {p.name for p in used.iterdir()} == {
        "few_step", "scheduler", "README.md", "contract.json"
    }  # fmt: skip
    assert not leftovers(used)


def test_others_may_read_an_export_as_they_may_read_its_card(made: Student) -> None:
    files = [path for path in made.export.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert len({path.stat().st_mode for path in files}) == 1


def test_a_folder_of_somebody_else_is_refused(made: Student, used: Path) -> None:
    (used / "notes.txt").write_text("mine")
    before = content(used)
    with pytest.raises(ValueError, match="holds 'notes.txt', which is none of an export's"):
        export_checkpoint(made.config, made.checkpoint, used)
    assert content(used) == before and not leftovers(used)
    with pytest.raises(ValueError, match="is a file, but the export is a folder"):
        check_export_folder(used / "notes.txt")


@pytest.mark.parametrize("inside", ["merged/mine.txt", "tilt/mine.txt", "few_step/mine/notes.txt"])
def test_a_part_of_somebody_else_is_refused(tmp_path: Path, inside: str) -> None:
    """A folder that only has the name of an export's part."""
    mine = tmp_path / "out" / inside
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match="which is no pipeline|which is none of an export's"):
        check_export_folder(tmp_path / "out")


def test_it_is_refused_before_training(made: Student, tmp_path: Path) -> None:
    asked = [f"model.path={made.model}", "model.family=sd3", f"run.out={tmp_path / 'run'}"]
    config = load_config("sd3m_cold_start", [*asked, "data.prompts=p.txt"])
    check_export(config)
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"mine\.txt"):
        check_export(config)


def test_through_a_link_the_target_is_replaced(made: Student, used: Path) -> None:
    link = used.parent / "link"
    link.symlink_to(used)
    export_checkpoint(made.config, made.checkpoint, link)
    assert link.is_symlink() and not (used / "merged").exists() and (used / "tilt").is_dir()


PLACES = [
    (writer, "save_file", 0),
    (writer, "save_file", 1),
    (CPSFlowMatchScheduler, "save_pretrained", 0),
    (command, "save_merged", 0),
    (command, "_write", 0),
    (command, "_write", 3),
    (command, "model_card", 0),
    (os, "fsync", 0),
    (os, "fsync", 7),
    (os, "rename", 0),
    (os, "rename", 1),
]


@pytest.mark.parametrize("kind", ["errno", "safetensors"])
@pytest.mark.parametrize(("place", "name", "after"), PLACES)
def test_a_full_disk_leaves_the_old_export_whole(
    made: Student,
    used: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    after: int,
    kind: str,
) -> None:
    """One sentence with the folder, and the old export as it was, wherever the disk gets full."""
    before, calls, real = content(used), [0], getattr(place, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] <= after:
            return real(*args, **kwargs)
        if kind == "safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    def copied(*args: Any, **kwargs: Any) -> float:  # quick, in the place of a merged pipeline
        shutil.copytree(made.export / "merged", args[-1])
        return 1.0

    if name != "save_merged":
        monkeypatch.setattr(command, "save_merged", copied)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        if name == "rename" and after:  # the first is put back by a third, which succeeds
            patch.setattr(place, name, lambda *a: full(*a) if calls[0] < 2 else real(*a))
        with pytest.raises(OSError, match="No space left on device") as caught:
            export_checkpoint(made.config, made.checkpoint, used, Wanted(MERGED))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(used)
    assert "\n" not in str(caught.value) and "as it was" in str(caught.value)
    assert calls[0] > after and content(used) == before and not leftovers(used)


def test_a_real_full_disk_is_one_sentence(made: Student, tmp_path: Path) -> None:
    """A limit on the size of files, which the system itself enforces, in a process of its own."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import numpy as np; from tiltflow.formats import folder as f\n"
        "from safetensors.numpy import save_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with f.replacing(Path(sys.argv[1])) as part:\n"
        "        save_file({'a': np.zeros(10_000)}, part / 'a.safetensors')\n"
        "except OSError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.stdout.startswith("OSError [Errno 27] File too large"), done.stderr
    assert str(tmp_path / "out") in done.stdout and not any(tmp_path.iterdir())


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    yield done.pid


def test_what_a_kill_left_is_put_right(used: Path, dead: int) -> None:
    before = content(used)
    # killed while it was writing
    (used.parent / f".export.part-{dead}").mkdir()
    # and another between the two renames
    os.rename(used, used.parent / f".export.old-{dead}")
    with pytest.raises(KeyboardInterrupt), replacing(used):
        assert content(used) == before
        raise KeyboardInterrupt
    assert content(used) == before and not leftovers(used)


def test_no_file_names_a_path_of_this_machine(made: Student, tmp_path: Path) -> None:
    private = [str(made.model.parent).encode(), str(tmp_path.parent).encode()]
    for file in made.export.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not any(name in data for name in private), file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stochastic_sampling": True}, "eta in place of stochastic_sampling"),
        ({"invert_sigmas": True}, "no inverted levels"),
        ({"shift_terminal": 0.1}, "gives 1 step the levels"),
    ],
)
def test_a_scheduler_that_no_export_can_have_is_found_before_training(
    made: Student, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    asked = [f"model.path={model}", "model.family=sd3", "sampler.steps=1"]
    config = load_config("sd3m_cold_start", [*asked, f"run.out={tmp_path}", "data.prompts=p.txt"])
    with pytest.raises(ValueError, match=said):
        check_export(config)
