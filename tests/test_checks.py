"""The one list of checks that `doctor` and `train` go through."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from tiltflow.cli.main import main
from tiltflow.config.load import load_config
from tiltflow.core.paths import resolve_path
from tiltflow.setup import checks
from tiltflow.setup.build import build_backbone
from tiltflow.setup.checks import CHECKS, Check, Subject, check_run, findings


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command line."""
    monkeypatch.setattr(sys, "argv", ["tiltflow", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text('a "sign"\n')
    return tmp_path


def test_the_demo_is_in_order() -> None:
    found = list(findings(Subject(load_config("demo_cold_start", ["run.device=cpu"]))))
    assert [finding.name for finding in found] == [check.name for check in CHECKS]
    assert not any(finding.failed for finding in found)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("terms", "check_objective"),
        ("weights", "check_model"),
        ("adapters", "check_adapters"),
        ("rewards", "check_reward_imports"),
        ("prompts and rewards", "check_prompts_fit"),
        ("room on the disk", "check_disk_room"),
        ("export", "check_export"),
    ],
)
def test_doctor_and_train_both_go_through(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, calls: str,
) -> None:  # fmt: skip
    """What one of these says ends both, before a directory is made."""
    (listed,) = (replace(check, needs=()) for check in CHECKS if check.name == name)
    monkeypatch.setattr(checks, "CHECKS", (listed,))  # by itself, for speed

    def refuse(*given: object) -> None:
        raise ValueError(f"{calls} was asked")

    monkeypatch.setattr(checks, calls, refuse)
    for command in ("doctor", "train"):
        assert run(monkeypatch, command, "mixture_cold_start", "run.device=cpu") == 2
        assert f"{calls} was asked" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["prompts.txt"]


def test_needed_checks_stand_before_those_that_need_them() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    for place, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:place])


def test_what_needs_a_failed_check_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(on: Subject) -> None:
        raise ValueError("no")

    listed = (Check("a", refuse), Check("b", refuse, needs=("a",)), Check("c", lambda on: None))
    monkeypatch.setattr(checks, "CHECKS", listed)
    found = list(findings(Subject(load_config("mixture_cold_start"))))
    assert [(f.seen, f.failed) for f in found] == [(True, True), (False, False), (True, False)]


def test_doctor_says_all_that_is_wrong_and_train_the_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    wrong = ["demo_cold_start", "log.wandb=true", "data.prompts=none.txt", "run.device=cpu"]
    assert run(monkeypatch, "doctor", *wrong) == 2
    said = capsys.readouterr()
    assert "packages: log.wandb is true, but wandb is not installed" in said.out
    assert "\nprompts: there is no file none.txt" in said.out
    assert "model: ok" in said.out
    assert "2 checks failed (packages, prompts)" in said.err
    assert run(monkeypatch, "train", *wrong, "run.out=out") == 2
    said = capsys.readouterr()
    assert said.err.startswith("tiltflow: log.wandb is true") and said.err.count("\n") == 1
    assert not (here / "out").exists()


@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_a_sink_without_its_package_is_found_before_the_model_loads(
    here: Path, monkeypatch: pytest.MonkeyPatch, sink: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=f"log.{sink} is true, but {sink} is not installed"):
        check_run(load_config("demo_cold_start", [f"log.{sink}=true", "run.device=cpu"]))


def test_stage_2_is_planned_before_stage_1_is_there(
    here: Path,
    tiny_pipeline: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "prompts.txt").write_text("a sign\n")
    settings = [
        "sd35m_tilt",
        f"model.path={tiny_pipeline('sd35m')}",
        "model.resolution=32",
        "data.prompts=prompts.txt",
        "rewards={clipscore: 1.0}",
        "watch.rewards={}",
    ]
    assert run(monkeypatch, "doctor", *settings) == 0
    said = capsys.readouterr().out
    assert "stage 1: not yet: model.few_step runs/sd35m_cold_start is no directory" in said
    assert "peak of an iteration" in said
    assert run(monkeypatch, "train", *settings, "run.out=out") == 2
    assert "train stage cold_start first" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run.out", "prompts.txt/run", "prompts.txt is no directory"),
        ("run.out", "prompts.txt", "prompts.txt is no directory"),
        ("run.out", "dangling/run", "dangling is no directory"),
        ("run.out", "a" * 300, "File name too long"),
        ("run.out", "shut/run", "shut may not be written to"),
        ("data.cache", "prompts.txt", "prompts.txt is no directory"),
    ],
)
def test_places_that_cannot_be_made_are_found_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, words: str
) -> None:
    (here / "dangling").symlink_to("nowhere")
    (here / "shut").mkdir()
    real = os.access
    shut = str(here / "shut")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != shut and real(path, mode))
    with pytest.raises(ValueError) as caught:
        check_run(load_config("demo_cold_start", ["run.device=cpu", f"{key}={value}"]))
    assert str(caught.value).startswith(f"{key} {value} cannot be made: ")
    assert words in str(caught.value)
    assert not (here / "shut" / "run").exists()


def test_a_null_character_in_a_path_is_refused_with_its_key() -> None:
    with pytest.raises(ValueError, match="run.out is 'a.x00b', but it should have no null"):
        load_config("demo_cold_start", [r'run.out="a\0b"'])


def merged(model: Path, place: Path) -> Path:
    """A pipeline as an export merges a student into it."""
    index = json.loads((shutil.copytree(model, place) / "model_index.json").read_text())
    index["scheduler"] = ["tiltflow.scheduler", "CPSFlowMatchScheduler"]
    (place / "model_index.json").write_text(json.dumps(index))
    return place


@pytest.mark.long
def test_a_merged_student_is_no_teacher(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = merged(Path(resolve_path("packaged:pipeline")), here / "student")
    settings = ["demo_cold_start", f"model.path={student}", "run.device=cpu", "run.out=out"]
    (listed,) = (check for check in CHECKS if check.name == "model")
    monkeypatch.setattr(checks, "CHECKS", (listed,))  # by itself, for speed
    said = f"{student} is a merged student .* and cannot be a teacher: .* model.few_step=RUN"
    assert run(monkeypatch, "doctor", *settings) == 2
    assert re.search(f"\nmodel: model.path: {said}", capsys.readouterr().out)
    assert run(monkeypatch, "train", *settings) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "generator_path" not in error
    assert not (here / "out").exists()
    with pytest.raises(ValueError, match=said):  # as one on the hub, after its download
        build_backbone(load_config(settings[0], settings[1:]), "image")


@pytest.mark.long
def test_a_merged_student_is_a_generators_start(
    here: Path, tiny_pipeline: Callable[[str], Path]
) -> None:
    student = merged(tiny_pipeline("klein"), here / "student")
    model = Flux2Transformer2DModel.from_pretrained(student / "transformer")
    with torch.no_grad():
        model.proj_out.weight.mul_(1.5)
    model.save_pretrained(student / "transformer")
    settings = ["model.resolution=64", "model.max_sequence_length=24", "run.device=cpu"]
    settings += ["data.prompts=prompts.txt", "model.dtype=fp32", f"model.generator_path={student}"]
    base = tiny_pipeline("klein_base")
    cfg = load_config("flux2_klein_4b_cold_start", [f"model.path={base}", *settings])
    check_run(cfg)
    backbone: Any = build_backbone(cfg, "image")
    assert torch.equal(backbone.student_base.proj_out.weight, model.proj_out.weight)
    assert not torch.equal(backbone.teacher_base.proj_out.weight, model.proj_out.weight)
    other = load_config("flux2_klein_4b_cold_start", [f"model.path={student}", *settings])
    with pytest.raises(ValueError, match=f"or model.generator_path={student}"):
        check_run(other)
