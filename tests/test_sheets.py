"""A run's sheets of samples: which branch of the run they are of, and which prompts they show."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from desk_data import make_run, served
from PIL import Image

from tiltflow.config.load import load_config
from tiltflow.config.recipe_source import read_recipe
from tiltflow.data.prompts import Prompt
from tiltflow.desk import runs
from tiltflow.desk.app import Desk
from tiltflow.tasks import sheets, train
from tiltflow.tasks.report import _sheets
from tiltflow.tasks.run import Run

BEFORE, AFTER = [Prompt("a cat"), Prompt("a dog")], [Prompt("a red circle")]


def draw(run: Path, step: int, prompts=BEFORE, grey: int = 0) -> Path:
    pixels = np.full((8, 64, 3), grey, np.uint8)
    return sheets.save_sheet(run, step, pixels, prompts)


def desk_shows(run: Path) -> dict[int, tuple[str, ...]]:
    """The prompts that the desk's page puts under each sheet."""
    found = runs.view(run, runs.Log(run / "metrics.jsonl"))
    return {
        step: tuple(found["prompts"][number])
        for step, number in zip(found["samples"], found["captions"], strict=True)
    }


def report_shows(run: Path) -> dict[int, tuple[str, ...]]:
    settings = read_recipe(str(run / "config.yaml"))
    return {sheet.step: sheet.prompts for sheet in _sheets(run, "run", settings)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a log and a config, and no sheets yet."""
    made = make_run(tmp_path / "run")
    shutil.rmtree(made / "samples")
    return made


def test_what_trains_removes_the_sheets_of_the_branch_it_left(tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = [
        f"run.out={out}", "run.device=cpu", "train.batch_size=4", "watch.rewards={}",
        "cold_start.generator_every=1", "log.samples_every=0", "data.eval_prompts=null",
    ]  # fmt: skip

    def go(*more: str) -> None:
        train.train_run(load_config("mixture_cold_start", [*common, *more]))

    go("train.steps=1")
    for step in (0, 1, 2):
        draw(out, step)
    go("train.steps=2", "run.resume=true", "run.resume_from=step-000001")
    assert list(sheets.sheets(out)) == [0, 1]


@pytest.mark.long
def test_a_run_that_goes_on_leaves_no_sheet_of_the_branch_it_left(tmp_path: Path) -> None:
    """And every sheet keeps its own prompts, though they have changed meanwhile."""
    for name, text in (("one.txt", "a cat\na dog\n"), ("two.txt", "a bird\na fish\n")):
        (tmp_path / name).write_text(text)
    out = tmp_path / "run"
    common = [
        f"data.prompts={tmp_path / 'one.txt'}", f"run.out={out}", "train.batch_size=2",
        "train.micro_batch_size=2", "adapters.rank=2", "adapters.alpha=4.0", "watch.rewards={}",
        "log.samples=2", "log.samples_every=2", "log.every=1", "checkpoint.every=2",
        "checkpoint.keep=9", "data.cache=off", "run.device=cpu",
    ]  # fmt: skip

    def go(*more: str) -> None:
        train.train_run(load_config("demo_cold_start", [*common, *more]))

    go("train.steps=4", f"data.eval_prompts={tmp_path / 'one.txt'}")
    assert list(desk_shows(out)) == [0, 2, 4]
    other = f"data.eval_prompts={tmp_path / 'two.txt'}"
    go("train.steps=3", other, "run.resume=true", "run.resume_from=step-000002")
    one, two = ("a cat", "a dog"), ("a bird", "a fish")
    assert desk_shows(out) == {0: one, 2: one, 3: two}
    assert report_shows(out) == {0: one, 3: two}
    assert [path.name for path in Run(out).samples] == [
        "step-000000.png", "step-000002.png", "step-000003.png"
    ]  # fmt: skip


def test_later_sheets_go_with_their_prompts_and_what_a_kill_left(run: Path) -> None:
    for step in (0, 2, 4, 1_000_000):
        draw(run, step)
    folder = run / "samples"
    (folder / "step-000006.txt").write_text("a fish\n")  # killed before its picture
    (folder / ".step-000006.png.part").write_bytes(b"half")
    (folder / ".step-000006.txt.part").write_text("half")
    (folder / "mine.png").touch()
    assert list(sheets.sheets(run)) == [0, 2, 4, 1_000_000]
    sheets.drop_sheets(run, 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        "mine.png", "step-000000.png", "step-000000.txt", "step-000002.png", "step-000002.txt"
    ]  # fmt: skip
    sheets.drop_sheets(run, -1)
    assert [path.name for path in folder.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("last", ["write_whole", "fsync", "os.replace"])
def test_a_kill_leaves_no_picture_without_its_prompts(
    run: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    draw(run, 0)
    with monkeypatch.context() as patched:
        patched.setattr(f"tiltflow.tasks.sheets.{last}", kill)
        with pytest.raises(Killed):
            draw(run, 2, AFTER)
    assert desk_shows(run) == {0: ("a cat", "a dog")}
    draw(run, 2, AFTER)
    assert desk_shows(run) == report_shows(run) == {0: ("a cat", "a dog"), 2: ("a red circle",)}
    assert not list((run / "samples").glob(".*"))


def test_a_kill_while_sheets_go_leaves_none_under_other_prompts(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (0, 2, 4):
        draw(run, step)
    whole, unlink, left = desk_shows(run), Path.unlink, 9
    for kills in range(1, 5):
        left = kills

        def counted(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", counted)
            sheets.drop_sheets(run, 0)
        shown = desk_shows(run)
        assert shown.items() <= whole.items() and 0 in shown
        for step in (2, 4):
            draw(run, step)


def test_one_file_for_all_sheets_is_read_of_runs_of_earlier_versions(run: Path) -> None:
    for step in (0, 2, 4):
        draw(run, step).with_suffix(".txt").unlink()
    shared = run / "samples" / "prompts.txt"
    shared.write_text("a cat\na dog\n")
    one = ("a cat", "a dog")
    assert desk_shows(run) == {0: one, 2: one, 4: one}
    assert report_shows(run) == {0: one, 4: one}
    draw(run, 6, AFTER)  # the run goes on: of other prompts, maybe, than that file is of
    assert desk_shows(run) == {0: (), 2: (), 4: (), 6: ("a red circle",)}
    assert report_shows(run) == {0: (), 6: ("a red circle",)}
    sheets.drop_sheets(run, 2)  # and that file was written with the last of them
    assert desk_shows(run) == {0: (), 2: ()}


def test_a_sheet_that_was_drawn_anew_is_not_given_for_the_one_before(run: Path) -> None:
    """A page that has not heard of it would put it above the prompts of the one before."""
    draw(run, 2, grey=10)
    with served(Desk([run], run.parent / "votes.jsonl")) as client:
        place = f"/api/run/{client.json('/api/overview')['runs'][0]['id']}"
        old = client.json(place)["drawn"][0]
        assert client.ask(f"{place}/sample/2?drawn={old}")[0].status == 200
        sheets.drop_sheets(run, 0)
        assert client.ask(f"{place}/sample/2?drawn={old}")[0].status == 404
        file = draw(run, 2, AFTER, grey=20)
        assert client.ask(f"{place}/sample/2?drawn={old}&side=64")[0].status == 404
        new = client.json(place)["drawn"][0]
        response, picture = client.ask(f"{place}/sample/2?drawn={new}")
        assert response.status == 200 and picture == file.read_bytes()
        assert np.asarray(Image.open(file)).max() == 20
