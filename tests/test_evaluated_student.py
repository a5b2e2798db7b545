"""Which student an evaluation is of: what its file, a card and a report say of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from students import Student, request, student

from tiltflow.evaluation.files import read_evaluation
from tiltflow.evaluation.report import _explained
from tiltflow.formats.wanted import Wanted
from tiltflow.tasks.evaluate import evaluated
from tiltflow.tasks.export import export_checkpoint
from tiltflow.tasks.request import Request

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    out = tmp_path_factory.mktemp("made")
    return student(tiny_pipeline, "sd3m", out, formats=("diffusers", "merged"), strengths=(0.5,))


@pytest.fixture
def evaluate(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Request], dict[str, Any]]:
    """Evaluates by a reward of one's own, and reads the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_bright.py").write_text(
        "def f(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    )

    def run(asked: Request) -> dict[str, Any]:
        evaluated(tmp_path / "evaluation.json", asked)
        return read_evaluation(tmp_path)

    return run


def asked(made: Student, **options: Any) -> Request:
    rewards = {"mine_bright:f": None}
    return request(made, rewards=rewards, teacher_steps=1, cache="off", **options)


def card(made: Student, evaluation: dict[str, Any], out: Path) -> str:
    wanted = Wanted(("diffusers", "merged"), (0.0, 1.0))
    export_checkpoint(made.config, made.checkpoint, out, wanted, evaluation)
    return (out / "README.md").read_text()


def test_a_baked_lora_is_stage_2s_student(
    made: Student, evaluate: Callable[[Request], dict[str, Any]], tmp_path: Path
) -> None:
    """It was called ac_dmd: its figures passed for those of stage 1."""
    found = evaluate(asked(made, few_step=made.export / "baked_0.5", tilt_lora=None))
    assert list(found["systems"]) == ["teacher", "teacher_4_step", "rtdmd"]
    assert _explained(found)["rtdmd"].endswith("(4 steps), at the strength 0.5")
    text = card(made, found, tmp_path / "out")
    assert "| rtdmd | 4 |" in text and "`rtdmd` has the tilt at 0.5." in text


def test_a_merged_pipelines_strength_is_said(
    made: Student, evaluate: Callable[[Request], dict[str, Any]], tmp_path: Path
) -> None:
    """A card with others beside it did not say which one its figures are of."""
    model = str(made.export / "merged")
    found = evaluate(asked(made, model=model, few_step=None, tilt_lora=None))
    assert list(found["systems"]) == ["merged"]
    assert _explained(found)["merged"].endswith("(4 steps), at the strength 0.5")
    assert "`merged` has the tilt at 0.5." in card(made, found, tmp_path / "out")


def test_the_adapters_are_those_at_hand(
    made: Student, evaluate: Callable[[Request], dict[str, Any]], tmp_path: Path
) -> None:
    """By the contract of the tilt, figures on another few-step adapter passed for this one's."""
    tensors = dict(made.checkpoint.tensors)
    tensors["few_step"] = {name: 2 * w for name, w in tensors["few_step"].items()}
    export_checkpoint(made.config, replace(made.checkpoint, tensors=tensors), tmp_path / "other")
    other = evaluate(asked(made, few_step=tmp_path / "other" / "few_step"))
    assert "Not evaluated" in card(made, other, tmp_path / "out")
    own = evaluate(asked(made))
    assert own["adapters"] == dict(asked(made).settled.adapters) != other["adapters"]
    assert "| rtdmd | 4 |" in card(made, own, tmp_path / "out")
