"""A study's cell is refused where what a file held that its run was trained from is another now,
under the name that the settings have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_study_settings import Killed, KilledAtACheckpoint, done

from tiltflow.core.paths import resolve_path
from tiltflow.rewards.files import REVISIONS
from tiltflow.tasks import study_content
from tiltflow.tasks.study import ASKED, CONTENT, Cell, cells_of, make_cells
from tiltflow.tasks.study_file import load_study

STUDY = """
rows:
  first: {recipe: demo_cold_start, set: {cold_start.objective: 'own_objective_s:Own'}}
  tilted:
    recipe: demo_tilt
    start: first
    set:
      rewards:
        clipscore: 1.0
        own_reward_s:f: 1.0
        judge:m: {weight: 1.0, options: {rubric: rubric.txt}}
      watch.rewards: {clipscore_heldout: {weight: 1.0, path: clip}}
      tilt.terms: {'own_term_s:Own': {}}
seeds: [0]
stages: {cold_start: {budget: 3000}, tilt: {budget: 3000}}
set: {model.path: model, data.prompts: train.txt, data.eval_prompts: fixed.txt}
prompts: held.txt
count: 2
rewards: [clipscore]
reference: first
"""
OWN = ("own_objective_s.py", "own_reward_s.py", "own_term_s.py", "rubric.txt")
CONTENTS = {
    "train.txt": "content.prompts", "fixed.txt": "content.eval_prompts",
    "own_objective_s.py": "content.code.cold_start.objective own_objective_s:Own",
    "own_reward_s.py": "content.rewards.own_reward_s:f",
    "own_term_s.py": "content.code.tilt.terms own_term_s:Own",
    "rubric.txt": "content.rewards.judge:m rubric",
    "model/transformer": "content.base", "model/text_encoder": "content.encoders",
    "clip": "content.watch.clipscore_heldout",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("pipeline", "clip"):
        shutil.copytree(resolve_path(f"packaged:{name}"), tmp_path / name)
    Path("pipeline").rename("model")
    for name in ("train.txt", "fixed.txt", "held.txt"):
        Path(name).write_text("a red circle\na blue star\n")
    for name in OWN:
        Path(name).write_text("x = 1\n")
    (tmp_path / "s.yaml").write_text(STUDY)
    return tmp_path


def cells(place: Path) -> dict[str, Cell]:
    return {cell.row: cell for cell in cells_of(load_study(place / "s.yaml"), place / "out")}


def changed(name: str) -> Callable[[], None]:
    """Replaces what a name is of by something as long, and gives how it is put back."""
    place = Path(name)
    file = place if place.is_file() else next(place.glob("*.safetensors"))
    before = file.read_bytes()
    if file.suffix == ".safetensors":
        save_file({k: -w for k, w in load_file(file).items()}, file, {"format": "pt"})
    else:
        file.write_bytes(before.replace(b"1", b"2").replace(b"red", b"tan"))
    assert file.read_bytes() != before
    return lambda: file.write_bytes(before) and None


@pytest.mark.long
def test_what_a_cell_was_trained_from_is_held_against_what_is_there(place: Path) -> None:
    for cell in cells(place).values():
        done(cell, cell.asked)
    shutil.copytree(place / "out", place / "earlier")
    for file in (place / "earlier").rglob("result.json"):  # a version that kept no digests
        result = json.loads(file.read_text())
        of = {k: v for k, v in result["asked"].items() if "content." not in k}
        file.write_text(json.dumps(result | {"asked": of}))
    for name, key in CONTENTS.items():
        back = changed(name)
        kept = {row: {key, f"start.{key}"} & {*cell.asked} for row, cell in cells(place).items()}
        assert kept["tilted"]
        for row, cell in cells(place).items():
            if not kept[row]:
                assert cell.result() is not None
                continue
            with pytest.raises(ValueError, match="is of other settings than") as refused:
                cell.result()
            assert key in str(refused.value)
        for cell in cells_of(load_study(place / "s.yaml"), place / "earlier"):
            assert cell.result() is not None
        back()
        assert all(cell.result() is not None for cell in cells(place).values())
    # as on a machine that has the results alone
    for name in CONTENTS:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    found = cells(place)
    assert all(cell.result() is not None for cell in found.values())
    known = [key for key in found["tilted"].asked if key.startswith(CONTENT)]
    assert known == ["scored.content.prompts", "scored.content.rewards"]


@pytest.mark.parametrize("scored", [True, False])
def test_a_builtin_reward_that_scores_otherwise_now_is_another(
    place: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """Or a study that was begun before an upgrade would hold both kinds of scores against each
    other. What earlier versions left says nothing of it."""
    text = (place / "s.yaml").read_text()
    text = text.replace("rewards: [clipscore]", "rewards: [hpsv2]") if scored else text.replace(
        "        clipscore: 1.0", "        hpsv2: 1.0")  # fmt: skip
    (place / "s.yaml").write_text(text)
    monkeypatch.setitem(REVISIONS, "hpsv2", 2)
    tilted = cells(place)["tilted"]
    key = f"{'scored.' * scored}content.revisions.hpsv2"
    earlier = {k: v for k, v in tilted.asked.items() if not k.endswith(key)}
    done(tilted, tilted.asked)
    assert cells(place)["tilted"].result() is not None
    monkeypatch.setitem(REVISIONS, "hpsv2", 3)
    with pytest.raises(ValueError, match=f"({key}: 2 → 3)"):
        cells(place)["tilted"].result()
    done(tilted, earlier)
    assert cells(place)["tilted"].result() is not None


def test_a_few_step_that_is_no_row_counts_by_its_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (place / "s.yaml").read_text()
    (place / "s.yaml").write_text(text.replace("start: first", "").replace(
        "      tilt.terms", "      model.few_step: lora\n      tilt.terms"))  # fmt: skip
    Path("lora").mkdir()
    seen = []
    for number in (1.0, 2.0, 1.0):
        Path("lora/w").write_text(f"{number}" * len(seen or "1"))
        weights = {"w": torch.tensor(number)}
        start = type("Start", (), {"few_step": weights})
        monkeypatch.setattr(study_content, "load_start", lambda path, start=start: start)
        seen.append(cells(place)["tilted"].asked["content.few_step"])
    assert seen[0] == seen[2] != seen[1]


def test_files_are_read_once_for_all_cells(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    for name in ("read_prompts", "model_fingerprints"):
        real = getattr(study_content, name)
        monkeypatch.setattr(study_content, name, lambda *a, real=real: calls.append(a) or real(*a))
    monkeypatch.setattr(study_content, "_TAKEN", {})
    for _ in range(3):
        assert all(cell.asked for cell in cells(place).values())
    assert len(calls) == 2


MIXTURE = """
rows:
  ac_dmd: {recipe: mixture_cold_start, set: {cold_start.generator_every: 1}}
seeds: [0]
stages: {cold_start: {budget: 700}}
set: {run.device: cpu, train.batch_size: 8, checkpoint.every: 2, data.prompts: train.txt}
prompts: held.txt
count: 2
rewards: [linear]
reference: ac_dmd
"""


def test_a_result_of_other_training_prompts_of_one_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text("one\ntwo\n")
    Path("train.txt").write_text("one\ntwo\n")
    (tmp_path / "s.yaml").write_text(MIXTURE)
    (cell,) = cells(tmp_path).values()
    done(cell, cell.asked)
    Path("train.txt").write_text("one\nten\n")
    (cell,) = cells(tmp_path).values()
    with pytest.raises(ValueError, match=r'\(content.prompts: "2 prompts \w+" → "2 prompts \w+"'):
        cell.result()
    done(cell, {k: v for k, v in cell.asked.items() if not k.startswith("content.")})
    assert cell.result() is not None  # of a version that kept no digest
    done(cell, cell.asked)
    Path("train.txt").unlink()
    (cell,) = cells(tmp_path).values()
    assert cell.result() is not None  # nothing is known against it where the file is not there


@pytest.mark.long
def test_a_half_trained_run_does_not_go_on_with_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "held.txt"):
        Path(name).write_text("one\ntwo\n")
    file = tmp_path / "s.yaml"
    file.write_text(MIXTURE)

    def make(**more: object) -> bool:
        return make_cells(file, cells_of(load_study(file), tmp_path / "out"), **more)  # type: ignore[arg-type]

    with pytest.raises(Killed):
        make(callbacks=KilledAtACheckpoint())
    Path("train.txt").write_text("uno\ndos\n")
    with pytest.raises(ValueError, match=rf"{ASKED} is of other settings .* \(content.prompts: "):
        make()
    Path("train.txt").write_text("one\ntwo\n")
    assert make()
