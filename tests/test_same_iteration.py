"""`benchmarks/same_iteration.py` but for the authors' code, which is not here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tiltflow.core.randomness import Randomness

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("same_iteration")


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["same_iteration.py", *words])
    script.main()


def test_a_folder_that_is_not_theirs_is_refused_in_a_sentence(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(script, monkeypatch, "--reference", str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} is not a checkout of Harahan/RTDMD: "
        "there is no rtdmd/trainers/rtdmd_trainer.py in it"
    )


def measured(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """The command with iterations whose generators' gradients differ so."""

    def stage(*_: object) -> Iterator[dict[str, float]]:
        yield from ({script.FAKE: 1e-6, script.GENERATOR: value} for value in values)

    monkeypatch.setattr(script, "STAGES", {"cold_start": stage, "tilt": stage})
    monkeypatch.setattr(script, "find_theirs", lambda _: None)
    run(script, monkeypatch, "--reference", "theirs", "--stage", "tilt", "--model", "sd35m")


def test_the_table_has_the_largest_of_the_iterations(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(script, monkeypatch, 1e-6, 2e-6, 1e-6)
    assert "| tilt | sd35m | 1e-06 | 2e-06 | – |" in capsys.readouterr().out


@pytest.mark.parametrize("value", [0.9, float("nan")])
def test_a_figure_that_is_not_below_its_bound_fails(
    value: float, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="above the bound: generator's gradient of tilt with sd3"):
        measured(script, monkeypatch, value, 1e-6)


def test_a_draw_of_another_kind_or_shape_is_refused(script: ModuleType) -> None:
    fed: Any = script.Fed([("rand", torch.ones(2)), ("randn_like", torch.ones(2))])
    with pytest.raises(AssertionError, match="by randn where our next draw is one by rand"):
        fed.randn(2)
    with pytest.raises(AssertionError, match="randn_like of"):
        fed.randn_like(torch.ones(3))


@pytest.mark.long
@pytest.mark.parametrize("name", ["cold_start", "tilt"])
def test_what_is_handed_over_is_all_that_our_iteration_draws(
    name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every stream at its step, but the order of the prompts: theirs are given the prompts."""
    drawn: set[tuple[str, int]] = set()
    plain = Randomness.generator

    def seen(self: Randomness, stream: str, step: int) -> torch.Generator:
        drawn.add((stream, step))
        return plain(self, stream, step)

    with script.random_model("sd35m", torch.device("cpu"), True, tmp_path) as model:
        bench = script.Bench(model, 8, 64)
        more = ["tilt.group_size=4", "tilt.keep_graph=false"] if name == "tilt" else []
        stage = model.build(name, *bench.settings(*script.PLAIN, *more)).stage
        step = 19 if name == "cold_start" else 1
        monkeypatch.setattr(Randomness, "generator", seen)
        stage.iteration(step)
        ours = set(drawn)
        drawn.clear()
        {"cold_start": script.cold_start_draws, "tilt": script.tilt_draws}[name](stage, step)
    assert drawn == {draw for draw in ours if draw[0] != "prompts"}
