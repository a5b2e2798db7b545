"""A study's cell is what was trained and scored with the settings that it is filed under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiltflow.tasks import study as making
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.study import ASKED, RESULT, Cell, cells_of, make_cells
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.study_table import summarise

ROOT = Path(__file__).parents[1]
SMALL = """
rows:
  ac_dmd: {recipe: mixture_cold_start, set: {cold_start.generator_every: 1}}
  slow: {like: ac_dmd, set: {train.generator_lr: 1.0e-4}}
seeds: [0]
stages: {cold_start: {budget: 700}}
set: {run.device: cpu, train.batch_size: 8, checkpoint.every: 2, log.every: 1}
prompts: prompts.txt
count: 4
rewards: [linear]
reference: ac_dmd
"""
REFUSED = r"asked.json is of other settings than the study has now \(train.batch_size: 8 → 4\)"


class Killed(Exception):
    """A process that is no more."""


class KilledAtACheckpoint(Callbacks):
    def checkpoint(self, step: int, path: Path) -> None:
        raise Killed


def killed(*args: Any, **options: Any) -> Any:
    raise Killed


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def edited(file: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


def cells(file: Path) -> list[Cell]:
    return cells_of(load_study(file), file.parent / "out", ["ac_dmd"])


def other(file: Path) -> Path:
    return edited(file, ("batch_size: 8", "batch_size: 4"))


@pytest.mark.long
def test_a_run_that_was_killed_before_its_result_keeps_its_settings(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(making, "_scored", killed)
        with pytest.raises(Killed):
            make_cells(file, cells(file))
    (cell,) = cells(other(file))
    with pytest.raises(ValueError, match=REFUSED):
        make_cells(file, [cell])
    assert not (cell.folder / RESULT).exists()
    # what is scored may be put right without training again
    monkeypatch.setattr(making, "train_run", killed)
    (cell,) = cells(edited(file, ("count: 4", "count: 3")))
    assert make_cells(file, [cell])
    result = cell.result()
    assert result is not None and result["asked"]["train.batch_size"] == 8
    assert len(result["scores"]["linear"]) == 3


@pytest.mark.long
def test_a_half_trained_run_does_not_go_on_with_other_settings(file: Path) -> None:
    with pytest.raises(Killed):
        make_cells(file, cells(file), callbacks=KilledAtACheckpoint())
    (cell,) = cells(other(file))
    with pytest.raises(ValueError, match=REFUSED):
        make_cells(file, [cell])
    # of another row, too, before that row's run begins
    both = cells_of(load_study(file), file.parent / "out")
    with pytest.raises(ValueError, match=REFUSED):
        make_cells(file, both[::-1])
    assert not both[1].folder.exists()
    (cell.folder / ASKED).write_text("{}")
    with pytest.raises(ValueError, match="asked.json is no record of a study"):
        make_cells(file, [cell])
    # one of an earlier version has not said what it is trained with, and goes on
    (cell.folder / ASKED).unlink()
    assert make_cells(file, [cell]) and cell.result() is not None
    assert json.loads((cell.folder / ASKED).read_text())["asked"] == cell.trained_with


def test_settings_with_which_nothing_was_trained_bind_nobody(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(making, "train_run", killed)
        with pytest.raises(Killed):
            make_cells(file, cells(file))
    (cell,) = cells(file)
    assert (cell.folder / ASKED).is_file()
    (cell,) = cells(other(file))
    with monkeypatch.context() as patch:  # but with a checkpoint there is something to keep
        patch.setattr(making, "latest_step", lambda run: 2)
        with pytest.raises(ValueError, match=REFUSED):
            make_cells(file, [cell])
    cell.begin()
    assert json.loads((cell.folder / ASKED).read_text())["asked"]["train.batch_size"] == 4


def done(cell: Cell, asked: dict[str, Any]) -> None:
    """A result as a scoring of four prompts writes it."""
    cost = {"forward": 1, "backward": 1, "scored": 0, "pulled": 0}
    result = {"row": cell.row, "seed": 0, "stage": "cold_start", "steps": 1, "cost": cost}
    result |= {"nfe": 4, "vendi": None, "scores": {"linear": [0.1, 0.2, 0.3, 0.5]}, "asked": asked}
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / RESULT).write_text(json.dumps(result))


def test_rows_scored_on_other_prompts_of_one_name_are_not_compared(file: Path) -> None:
    out = file.parent / "out"
    first, _ = cells_of(load_study(file), out)
    done(first, first.asked)
    Path("prompts.txt").write_text("uno\ndos\ntres\ncuatro\n")
    study = load_study(file)
    for cell in cells_of(study, out)[1:]:
        done(cell, cell.asked)
    with pytest.raises(ValueError, match=r"scored.content.prompts: \"4 prompts \w+\" → \"4 pro"):
        summarise(study, out)
    # prompts that are not scored may be others
    Path("prompts.txt").write_text("uno\ndos\ntres\ncuatro\ncinco\n")
    assert cells_of(load_study(file), out)[1].result() is not None
    # a version that kept no digest: nothing is known
    old = {key: value for key, value in first.asked.items() if "content" not in key}
    assert len(old) < len(first.asked)
    done(first, old)
    assert len(summarise(study, out)["comparisons"]) == 1


def test_a_study_scores_the_prompts_that_its_results_name(file: Path) -> None:
    """The file is replaced while the study runs."""
    study = load_study(file)
    said = study.content["prompts"]
    Path("prompts.txt").write_text("uno\ndos\ntres\ncuatro\n")
    assert [prompt.text for prompt in study.scored()] == ["one", "two", "three", "four"]
    assert load_study(file).content["prompts"] != said


def test_a_reward_of_ones_own_that_was_changed_is_told(file: Path) -> None:
    own = Path("own_of_a_study.py")
    own.write_text("class Own: ...\n")
    edited(file, ("[linear]", "[linear, 'own_of_a_study:Own']"))
    (cell,) = cells(file)
    done(cell, cell.asked)
    assert cells(file)[0].result() is not None
    own.write_text("class Own: other = True\n")
    with pytest.raises(ValueError, match=r"scored.content.rewards.own_of_a_study:Own: "):
        cells(file)[0].result()
    own.unlink()  # as on a machine that has the results alone
    assert cells(file)[0].result() is not None


@pytest.mark.parametrize(
    ("name", "folder"), [("paper", "study"), ("steps", "steps"), ("checker", "study")]
)
def test_results_of_earlier_versions_stay_valid(name: str, folder: str) -> None:
    kept = ROOT / "docs" / "data" / folder
    found = cells_of(load_study(ROOT / "studies" / f"{name}.yaml"), kept, seeds=[0])[:3]
    results = [cell.result() for cell in found]
    assert None not in results
    for result in results:
        assert result is not None and not any("content" in key for key in result["asked"])
