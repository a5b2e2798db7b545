"""`import tiltflow`: its names, what they do, and the commands' ease around them."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import SRC

import tiltflow
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.randomness import SAMPLE_INIT, Randomness, sample_step
from tiltflow.flow import cps_step
from tiltflow.models.families.mixture import MixtureBackbone

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
HEAVY = {"torch", "diffusers", "transformers", "pydantic", "peft", "numpy", "scipy", "rich"}


class Seen(tiltflow.Callbacks):
    """Everything that a training told its callbacks, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def begin(self, name: str, done: int, total: int | None) -> None:
        self.calls.append(("begin", (name, done, total)))

    def step(self, done: int, total: int) -> None:
        self.calls.append(("step", (done, total)))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        assert values["fake_score/ambient"] > 0
        self.calls.append(("metrics", step))

    def checkpoint(self, step: int, path: Path) -> None:
        assert path.is_dir()
        self.calls.append(("checkpoint", step))

    def samples(self, step: int, path: Path) -> None:
        Image.open(path).verify()
        self.calls.append(("samples", step))

    def progress(self, name: str, done: int, total: int) -> None:
        self.calls.append((name, (done, total)))

    def notice(self, text: str) -> None:
        self.calls.append(("notice", text))

    def stopped(self, step: int, text: str) -> None:
        self.calls.append(("stopped", step))


def mixture(out: Path, **train: object) -> tiltflow.RunConfig:
    return tiltflow.load_recipe(
        "mixture_cold_start",
        "train.batch_size=4",
        train={"steps": 4, **train},
        log={"every": 2},
        checkpoint={"every": 3},
        run={"out": out, "device": "cpu"},
    )


def test_import_waits_for_no_library() -> None:
    code = "import sys, tiltflow; dir(tiltflow); tiltflow.__version__; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert not HEAVY & set(done.stdout.split())


def test_commands_wait_for_the_libraries_that_they_need_alone() -> None:
    """Those of pipelines take seconds: a run on the mixture, the desk, a reward server of one's
    own function and a study need none."""
    modules = "train", "study", "reward_server", "evaluate", "export", "report", "demo", "doctor"
    code = "; ".join(
        ["import sys, tiltflow.desk.app", *(f"import tiltflow.tasks.{name}" for name in modules)]
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"], check=True, capture_output=True,
        text=True, env={"PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert not {"accelerate", "diffusers", "peft", "transformers"} & set(done.stdout.split())


def test_every_name_is_there_documented_and_on_the_page() -> None:
    assert set(tiltflow.__all__) <= set(dir(tiltflow))
    page = PAGE.read_text(encoding="utf-8")
    for name in tiltflow.__all__:
        thing = getattr(tiltflow, name)
        assert f"| `{name}" in page, name
        if name == "__version__":
            continue
        assert len(inspect.getdoc(thing) or "") > 20, name
        for part, member in vars(thing).items() if inspect.isclass(thing) else ():
            if not part.startswith("_") and callable(member):
                assert inspect.getdoc(member), f"{name}.{part}"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        tiltflow.trian  # noqa: B018


def test_type_checkers_see_what_is_loaded() -> None:
    """Each name stands in `__all__`, in the table, and among the imports for type checkers."""
    tree = ast.parse((SRC / "tiltflow" / "__init__.py").read_text())
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tiltflow."):
            imported |= {alias.name: node.module for alias in node.names}
    homes = {name: f"tiltflow.{home}" for name, home in tiltflow._HOMES.items()}
    assert imported == homes
    assert set(homes) | {"__version__"} == set(tiltflow.__all__)


def test_no_package_has_the_name_of_a_function() -> None:
    """Importing such a package would put it in the function's place."""
    packages = {path.parent.name for path in (SRC / "tiltflow").glob("*/__init__.py")}
    assert packages > {"core", "training"}
    assert not packages & set(tiltflow.__all__)


def test_recipes_and_settings() -> None:
    assert tiltflow.recipes()["mixture_cold_start"].startswith("Stage 1 on the closed-form")
    config = tiltflow.load_recipe(
        "mixture_tilt", "train.steps=7", rewards={"linear": 2.0}, watch={"every": 5},
        train={"generator_lr": 1e-5, "betas": (0.0, 0.5)}, run={"out": Path("a b: c")},
    )  # fmt: skip
    assert (config.train.steps, config.train.generator_lr) == (7, 1e-5)
    assert config.train.betas == (0.0, 0.5) and config.run.out == "a b: c"
    assert {name: reward.weight for name, reward in config.rewards.items()} == {"linear": 2.0}
    assert config.train.fake_score_lr == 1e-3  # the recipe's
    with pytest.raises(ValueError, match=r"unknown key train\.stesp"):
        tiltflow.load_recipe("mixture_tilt", train={"stesp": 1})


def test_train_tells_its_callbacks_and_opens_the_run(tmp_path: Path) -> None:
    seen = Seen()
    run = tiltflow.train(mixture(tmp_path / "run"), seen)
    assert seen.calls == [
        ("notice", "encoding 1 prompt"), ("notice", "loading mixture"),
        ("begin", ("cold_start", 0, 4)), ("step", (1, 4)), ("step", (2, 4)), ("metrics", 2),
        ("step", (3, 4)), ("checkpoint", 3), ("step", (4, 4)), ("metrics", 4), ("checkpoint", 4),
    ]  # fmt: skip
    assert isinstance(run, tiltflow.Run) and run.finished and run.step == 4
    assert [row["step"] for row in run.metrics] == [2, 4]
    assert run.config.train.steps == 4 and run.export is None and run.evaluation is None
    with pytest.raises(ValueError, match="already holds a run"):
        tiltflow.train(mixture(tmp_path / "run"))
    (tmp_path / "several" / "tilt").mkdir(parents=True)
    (tmp_path / "several" / "tilt" / "config.yaml").touch()
    with pytest.raises(ValueError, match="the runs in it are .*several/tilt$"):
        tiltflow.Run(tmp_path / "several")
    with pytest.raises(ValueError, match="is no run directory"):
        tiltflow.Run(tmp_path)


def test_callbacks_change_no_weight(tmp_path: Path) -> None:
    ends = []
    for name, callbacks in (("seen", Seen()), ("silent", tiltflow.Callbacks())):
        run = tiltflow.train(mixture(tmp_path / name), callbacks)
        ends.append(load_checkpoint(run.path).tensors)
    for group, tensors in ends[0].items():
        assert all(torch.equal(value, ends[1][group][key]) for key, value in tensors.items())


def test_what_a_callback_raises_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    class Enough(tiltflow.Callbacks):
        def checkpoint(self, step: int, path: Path) -> None:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        tiltflow.train(mixture(tmp_path / "run"), Enough())
    assert not tiltflow.Run(tmp_path / "run").finished
    again = tiltflow.load_recipe(tmp_path / "run" / "config.yaml", run={"resume": True})
    seen = Seen()
    assert tiltflow.train(again, seen).finished
    assert ("begin", ("cold_start", 3, 4)) in seen.calls
    assert ("notice", "going on from step 3 of 4") in seen.calls


def test_sample_evaluate_compare(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    model, seen = tiny_pipeline("sd35m"), Seen()
    how: tiltflow.Sampling = {"device": "cpu", "teacher_steps": 2, "max_sequence_length": 16}
    images = tiltflow.sample(model, ["a cat", "a dog"], callbacks=seen, **how)
    assert images.dtype == np.uint8 and images.shape[0] == 2 and images.shape[-1] == 3
    assert seen.calls[-1] == ("teacher", (2, 2))
    paths = tiltflow.sample(model, ["a cat", "a dog"], out=tmp_path / "images", **how)
    for path, image in zip(paths, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    figures = tmp_path / "evaluation.json"
    found = tiltflow.evaluate(
        model, ["a cat", "a dog", "a bird"], ["test_train:redness"], out=figures, **how
    )
    assert list(found.summary["systems"]) == ["teacher", "teacher_4_step"]
    assert len(found.scores["teacher"]["test_train:redness"]) == 3
    (row,) = tiltflow.compare(figures, systems=("teacher", "teacher_4_step"))
    assert row["difference"] == pytest.approx(
        np.mean(found.scores["teacher"]["test_train:redness"])
        - np.mean(found.scores["teacher_4_step"]["test_train:redness"])
    )
    assert tiltflow.compare(figures) == found.summary["comparisons"]


def test_the_mixtures_student_is_sampled_and_scored_as_its_run_left_it(tmp_path: Path) -> None:
    cold = tiltflow.train(mixture(tmp_path / "cold"))
    tilt = tiltflow.train(
        tiltflow.load_recipe(
            "mixture_tilt",
            model={"few_step": cold.path},
            tilt={"group_size": 2},
            train={"steps": 2, "batch_size": 8},
            run={"out": tmp_path / "tilt", "device": "cpu"},
        )
    )
    how: dict[str, Any] = {"few_step": cold.path, "device": "cpu"}
    points = tiltflow.sample("mixture", ["a", "b", "c"], **how)
    backbone, random = MixtureBackbone(), Randomness(0)
    network = backbone.new_copy("student", 0)
    network.load_state_dict(load_checkpoint(cold.path).tensors["ema"])
    x = torch.stack([random.normal(SAMPLE_INIT, n, (2,)) for n in range(3)])
    for k, (now, then) in enumerate(itertools.pairwise(backbone.few_step_sigmas(4))):
        noise = torch.stack([random.normal(sample_step(k), n, (2,)) for n in range(3)])
        with torch.no_grad():
            v = network(x, now.expand(3))
        x = cps_step(x, v, now.expand(3), then.expand(3), 0.9, noise)
    assert np.allclose(points, x.numpy(), atol=1e-5)
    tilted = tiltflow.sample("mixture", ["a", "b", "c"], tilt_lora=tilt.path, **how)
    assert points.shape == tilted.shape == (3, 2) and not np.array_equal(points, tilted)
    found = tiltflow.evaluate(
        "mixture", ["a", "b", "c"], ["linear"], out=tmp_path / "e.json", tilt_lora=tilt.path, **how
    )
    assert list(found.summary["systems"]) == ["teacher", "teacher_4_step", "ac_dmd", "rtdmd"]
    assert np.allclose(found.scores["ac_dmd"]["linear"], points[:, 0], atol=1e-6)
    for wrong, said in (({"tilt": 0.5}, "has no dial"), ({"few_step": tmp_path}, "checkpoint")):
        with pytest.raises(ValueError, match=said):
            tiltflow.sample("mixture", ["a"], **{**how, **wrong})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda out: tiltflow.sample("./nowhere", ["x"]), "nowhere"),
        (lambda out: tiltflow.sample("packaged:pipeline", ["x"], dtype="fp8"), "fp32, bf16"),
        (lambda out: tiltflow.sample("packaged:pipeline", []), "there is no prompt in"),
        (lambda out: tiltflow.sample("packaged:pipeline", ["x"], tilt=2.0), "--tilt is 2;"),
        (
            lambda out: tiltflow.sample("packaged:pipeline", ["x"], tilt=0.5),
            "no --tilt-lora to have",
        ),
        (lambda out: tiltflow.evaluate("packaged:pipeline", ["x"]), "at least one --reward"),
        (lambda out: tiltflow.evaluate("packaged:pipeline", suite="shaeps"), "shapes"),
        (
            lambda out: tiltflow.sample("packaged:pipeline", ["x"], few_steps="a"),  # type: ignore[call-overload]
            "no keyword 'few_steps'; did you mean 'few_step'",
        ),
        (lambda out: tiltflow.compare(out / "a.json"), "a.json"),
        (lambda out: tiltflow.export(out, out / "x"), "no run directory"),
        (lambda out: tiltflow.load_recipe("demo_tlit"), "demo_tilt"),
    ],
)
def test_bad_input_is_a_value_error(
    call: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        call(tmp_path)


def completed(line: str) -> list[str]:
    """What the shell is offered for the last word of a line."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "tiltflow"], check=True, capture_output=True, text=True,
        env={
            "PYTHONPATH": str(SRC), "PATH": os.environ["PATH"],
            "_TILTFLOW_COMPLETE": "complete_bash",
            "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        },
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tiltflow train demo_", {"demo_cold_start", "demo_tilt"}),
        ("tiltflow doctor mixture_t", {"mixture_tilt"}),
        ("tiltflow sample --tea", {"--teacher-steps"}),
        ("tiltflow eval", {"evaluate"}),
    ],
)
def test_the_shell_completes(line: str, offered: set[str]) -> None:
    assert set(completed(line)) == offered


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints, run from `folder`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments], cwd=folder,
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_example_own_reward(tmp_path: Path) -> None:
    said = run_example("own_reward.py", tmp_path)
    assert "step 2: warmth" in said and "tilt 0: warmth" in said and "tilt 1: warmth" in said


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "examples" / "demo.ipynb").read_text())[
        "cells"
    ]
    return found


def test_the_notebook_is_stripped_and_is_python() -> None:
    for cell in cells():
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells in order, as one program in a folder of its own."""
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    (tmp_path / "demo.py").write_text("\n\n".join(code))
    subprocess.run(
        [sys.executable, "demo.py"], cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert tiltflow.Run(tmp_path / "runs" / "notebook" / "tilt").finished
    figures = json.loads((tmp_path / "runs" / "notebook" / "evaluation.json").read_text())
    assert {"teacher", "ac_dmd", "rtdmd"} <= set(figures["systems"])


@pytest.mark.long
def test_example_python_api(tmp_path: Path) -> None:
    said = run_example("python_api.py", tmp_path)
    assert "step 200: matching loss" in said and "saved step-000200" in said
    assert "points (500, 2)" in said and "ac_dmd − teacher on linear" in said
    assert (tmp_path / "runs" / "python_api" / "evaluation.json").is_file()
