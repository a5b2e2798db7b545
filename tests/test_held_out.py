"""A reward that is trained on is no witness: it cannot be held out, under any name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tiltflow.config.load import load_config
from tiltflow.core.paths import resolve_path
from tiltflow.setup.checks import CHECKS, Subject
from tiltflow.setup.held_out import check_held_out


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def blue(images, prompts, metadata):
    return images[:, 2].mean((1, 2))


RUBRIC = {"rubric": "rubric.txt"}


def check(trained: dict[str, object], held: dict[str, object]) -> None:
    given = [f"rewards={json.dumps(trained)}", f"watch.rewards={json.dumps(held)}"]
    check_held_out(load_config("demo_tilt", ["run.out=x", "model.few_step=x", *given]))


def of(path: str | None = None, **options: object) -> dict[str, object]:
    return {"weight": 2.0, "options": options} | ({} if path is None else {"path": path})


@pytest.mark.parametrize(
    ("trained", "held"),
    [
        ({"clipscore": 1.0}, {"shapes": 1.0, "clipscore": 0.5}),
        ({"clipscore": 1.0}, {"clipscore": of(at_once=8)}),
        ({"clipscore": 1.0}, {"clipscore_heldout": of("packaged:clip")}),
        ({"clipscore": of("copy")}, {"clipscore": 1.0}),
        ({"pickscore": 1.0}, {"clipscore": of("yuvalkirstain/PickScore_v1")}),
        ({"shapes_soft": 1.0}, {"shapes": of(soft=True)}),
        ({"aesthetic": 1.0}, {"aesthetic": of(at_once=4)}),
        ({"test_held_out:red": 1.0}, {"test_held_out:red": of(at_once=4)}),
        ({"judge:m": of(**RUBRIC)}, {"judge:m": of(**RUBRIC, timeout=3.0, low=1.0)}),
        ({"remote:http://a/x": 1.0}, {"remote:http://a/x": of(timeout=3.0)}),
        ({"fitted": 1.0}, {"fitted_copy": 1.0}),
    ],
)
def test_a_trained_reward_is_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict, held: dict
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubric.txt").write_text("good is good\n")
    if "copy" in str(trained):
        shutil.copytree(resolve_path("packaged:clip"), tmp_path / "copy")
    for name in ("fitted", "fitted_copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.json").write_text("{}")
    name, other = next(iter(trained)), list(held)[-1]
    said = f"watch.rewards.{other} is trained on, as rewards.{name}, so it is not held out"
    with pytest.raises(ValueError, match=re.escape(said)):
        check(trained, held)


@pytest.mark.parametrize(
    ("trained", "held"),
    [
        ({"clipscore": 1.0}, {"clipscore_heldout": 1.0, "shapes": 1.0}),
        ({"clipscore": 1.0}, {"clipscore": of("packaged:clip_heldout")}),
        ({"shapes_soft": 1.0}, {"shapes": 1.0}),
        ({"test_held_out:red": 1.0}, {"test_held_out:blue": 1.0}),
        ({"judge:m": of(rubric="rubric.txt")}, {"judge:m": of(rubric="other.txt")}),
        ({"pickscore": 1.0}, {"image_reward": 1.0, "aesthetic": 1.0}),
    ],
)
def test_another_reward_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict, held: dict
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubric.txt").write_text("good is good\n")
    (tmp_path / "other.txt").write_text("good is red\n")
    check(trained, held)


def test_a_run_is_refused_before_it_begins() -> None:
    (listed,) = (check for check in CHECKS if check.name == "held-out rewards")
    given = ["run.out=x", "model.few_step=x", "watch.rewards={clipscore: 1.0}"]
    with pytest.raises(ValueError, match="clipscore is trained on"):
        listed.run(Subject(load_config("demo_tilt", given)))
