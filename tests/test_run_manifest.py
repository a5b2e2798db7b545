"""Of a pipeline's run: absolute paths, and what may not change when it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_run_directory import start

from tiltflow.config.load import PromptSets, load_config
from tiltflow.core.checkpoint import latest_step
from tiltflow.core.metrics import ANEW, read_metrics, set_apart
from tiltflow.data.prompts import Prompt
from tiltflow.rewards.files import REVISIONS
from tiltflow.setup.manifest import code_fingerprints, defaults_by_key, manifest_of
from tiltflow.setup.run_directory import with_absolute_paths
from tiltflow.training.changes import OF_THE_RUN, PROMPTS, changes

TINY = (
    "model.path=model", "data.prompts=p.txt", "model.dtype=fp32", "model.resolution=32",
    "adapters.rank=2", "adapters.alpha=4.0", "train.batch_size=2", "train.micro_batch_size=2",
    "model.gradient_checkpointing=false", "log.every=1", "log.samples_every=0",
    "checkpoint.every=2", "watch.rewards={}", "run.device=cpu",
)  # fmt: skip
TILT = (
    "model.few_step=cold", "tilt.group_size=2", "rewards={'test_run_manifest:bright': 1.0}",
)  # fmt: skip


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


bright.differentiable = True  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def place(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, prompts and runs of 2 steps, named by relative paths."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_pipeline("sd3m"), folder / "model")
    (folder / "p.txt").write_text("a cat\na dog\na red bird\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start("sd3m_cold_start", *TINY, "run.out=cold", "train.steps=2")
        start("sd3m_tilt", *TINY, *TILT, "run.out=tilt", "train.steps=2")
    return folder


@pytest.mark.long
def test_paths_in_the_resolved_config_are_absolute(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config(str(place / "tilt" / "config.yaml"))
    assert cfg.model.path == str(place / "model") and cfg.data.prompts == str(place / "p.txt")
    assert cfg.model.few_step == str(place / "cold")
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(place / "tilt", tmp_path / "tilt")
    said = start("tilt/config.yaml", "run.resume=true", "train.steps=4")
    assert latest_step(run) == 4 and "changed since step 2: train.steps 2 → 4" in said
    demo = load_config("demo_tilt", ["model.few_step=nowhere"])
    assert with_absolute_paths(demo) == demo  # packaged names, and what is not there


def scaled(file: Path) -> None:
    save_file({name: 1.5 * w for name, w in load_file(file).items()}, file)


def test_another_base_of_the_same_shapes_is_refused(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "cold", tmp_path / "cold")
    model = shutil.copytree(place / "model", tmp_path / "model")
    config = str(run / "config.yaml")
    start(config, "run.resume=true", f"model.path={model}", "train.steps=2")  # the same elsewhere
    scaled(model / "transformer" / "diffusion_pytorch_model.safetensors")
    match = r"its model.path \(by its weights\) is [0-9a-f]{59}…, but here it is"
    with pytest.raises(ValueError, match=match):
        start(config, "run.resume=true", f"model.path={model}", "train.steps=4")


def test_other_text_encoders_are_refused(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "cold", tmp_path / "cold")
    model = shutil.copytree(place / "model", tmp_path / "model")
    scaled(model / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match="its text encoders of model.path"):
        start(str(run / "config.yaml"), "run.resume=true", f"model.path={model}", "train.steps=4")


def test_a_start_that_was_trained_on_another_base_is_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shutil.copytree(place / "model", tmp_path / "model")
    scaled(next((tmp_path / "model" / "transformer").glob("*.safetensors")))
    words = "was trained on a base whose weights have the hash"
    for number, few_step in enumerate(("cold", "cold/export/few_step")):
        more = (f"run.out={tmp_path / str(number)}", f"model.few_step={few_step}", "train.steps=1")
        other = f"model.path={tmp_path / 'model'}"
        assert f"{few_step} {words}" in start("sd3m_tilt", *TINY, *TILT, *more, other)
        more = (f"run.out={tmp_path / f'{number}-same'}", *more[1:])
        assert words not in start("sd3m_tilt", *TINY, *TILT, *more)


def test_another_few_step_is_refused_and_other_prompts_are_told(
    place: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(place / "tilt", tmp_path / "tilt")
    config = str(run / "config.yaml")
    other = shutil.copytree(place / "cold", tmp_path / "cold")
    start(str(other / "config.yaml"), "run.resume=true", "train.steps=12")
    match = r"its model.few_step \(by its weights\) is \S+, but here it is"
    with pytest.raises(ValueError, match=match):
        start(config, "run.resume=true", f"model.few_step={other}", "train.steps=4")
    (tmp_path / "q.txt").write_text("a cat\na dog\n")
    changed = f"data.prompts={tmp_path / 'q.txt'}"
    said = start(config, "run.resume=true", changed, "train.steps=4")
    assert "data.prompts 3 prompts" in said and "→ 2 prompts" in said
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "changed" in row]
    assert len(rows) == 1 and "data.prompts 3 prompts" in rows[0]["changed"]


def test_a_stage_one_without_its_pointer_still_starts_stage_two(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    cold = shutil.copytree(place / "cold", tmp_path / "cold")
    (cold / "checkpoints" / "latest").unlink()
    start(
        "sd3m_tilt", *TINY, *TILT, f"model.few_step={cold}", f"run.out={tmp_path / 'tilt'}",
        "train.steps=1",
    )  # fmt: skip
    assert latest_step(tmp_path / "tilt") == 1


def test_a_setting_that_a_version_did_not_have_is_no_change(place: Path) -> None:
    """It did what the default does; another value is told as a change from that."""
    (state_file,) = (place / "tilt").glob("checkpoints/step-*/state.json")
    held = json.loads(state_file.read_text())["manifest"]
    for section, key in (("tilt", "terms"), ("train", "boundary_power"), ("model", "graphs")):
        del held["config"][section][key]
    known = defaults_by_key()
    assert known["tilt.terms"] == {} and known["train.boundary_power"] == 0.0
    state = {"stage": "tilt", "steps": 4, "manifest": held}
    here = json.loads(json.dumps(held))
    here["config"]["tilt"]["terms"] = {}
    here["config"]["model"]["graphs"] = False
    here["config"]["train"]["boundary_power"] = 1.0
    facts = {"stage": "tilt", "steps": 4, "manifest": here}
    assert changes(state, facts, known) == {"train.boundary_power": "0.0 → 1.0"}


@pytest.mark.long
def test_a_held_out_reward_of_stage_1_on_other_prompts_is_a_curve_of_its_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mean before and after were joined, as though the student had changed."""
    monkeypatch.chdir(place)
    fixed, out = tmp_path / "e.txt", tmp_path / "cold"
    fixed.write_text("a cat\na dog\n")
    more = [
        f"data.eval_prompts={fixed}", f"run.out={out}", "watch.every=1",
        "watch.rewards={'test_run_manifest:bright': 1.0}",
    ]  # fmt: skip
    start("sd3m_cold_start", *TINY, *more, "train.steps=2")
    start("sd3m_cold_start", *TINY, *more, "train.steps=4", "run.resume=true")
    anew = [row for row in read_metrics(out / "metrics.jsonl") if ANEW in row]
    assert anew == []
    fixed.write_text("a cat\na red bird\n")
    start("sd3m_cold_start", *TINY, *more, "train.steps=5", "run.resume=true")
    rows = read_metrics(out / "metrics.jsonl")
    name = "held_out/test_run_manifest:bright"
    (row,) = [row for row in rows if ANEW in row]
    assert row["step"] == 4 and row[ANEW] == name and "data.eval_prompts" in row["changed"]
    curves: dict[str, Any] = {name: [1]}
    set_apart(curves, row)
    assert curves == {f"{name} before step 4": [1]}


def test_another_revision_of_a_reward_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(str(place / "tilt" / "config.yaml"), ["rewards={ocr: 1.0, shapes: 1.0}"])
    sets = PromptSets([Prompt("a cat")], [Prompt("a dog")])

    def facts() -> dict[str, Any]:
        held = json.loads(json.dumps(manifest_of(cfg, sets, None)))
        return {"stage": "tilt", "steps": 4, "manifest": held}

    before = facts()
    monkeypatch.setitem(REVISIONS, "ocr", 77)
    assert changes(before, facts(), {}) == {"how reward ocr scores, by its revision": "2 → 77"}
    del before["manifest"]["revisions"]  # of an earlier version
    assert changes(before, facts(), {}) == {}


def test_other_files_of_a_reward_are_told(place: Path, tmp_path: Path) -> None:
    """Those at a reward's path, and those of a reward that is a folder."""
    folder, fitted, base = tmp_path / "clip", tmp_path / "mine", tmp_path / "base"
    for one in (folder, fitted, base):
        one.mkdir()
        (one / "weights").write_bytes(b"1")
    (fitted / "reward.json").write_text("{}")
    (base / "config.json").write_text("{}")
    (tmp_path / "rubric.yaml").write_text("1")
    options = (
        f"{{base: {base}, rubric: {tmp_path / 'rubric.yaml'}, cache: {tmp_path}, x: {'y' * 999}}}"
    )
    chosen = [
        f"rewards={{pickscore: {{weight: 1.0, path: {folder}}}, '{fitted}': 1.0, ocr: 1.0,"
        f" hpsv3: {{weight: 1.0, options: {options}}}}}"
    ]
    cfg = load_config(str(place / "tilt" / "config.yaml"), chosen)
    sets = PromptSets([Prompt("a cat")], [Prompt("a dog")])

    def facts() -> dict[str, Any]:
        held = json.loads(json.dumps(manifest_of(cfg, sets, None)))
        return {"stage": "tilt", "steps": 4, "manifest": held}

    before = facts()
    names = {"pickscore", str(fitted), "hpsv3 base", "hpsv3 rubric"}
    assert set(before["manifest"]["rewards"]) == names
    assert changes(before, facts(), {}) == {}
    (folder / "weights").write_bytes(b"2")
    (fitted / "more").write_bytes(b"2")
    (base / "weights").write_bytes(b"2")
    (tmp_path / "rubric.yaml").write_text("2")
    told = changes(before, facts(), {})
    assert told is not None
    assert set(told) == {f"the files of reward {name}" for name in names}
    del before["manifest"]["rewards"]  # of an earlier version
    assert changes(before, facts(), {}) == {}


def test_other_defaults_of_the_model_are_told(place: Path, tmp_path: Path) -> None:
    """Those of tiltflow.json, which no weight shows."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    cfg = load_config(str(place / "tilt" / "config.yaml"), [f"model.path={model}"])

    def facts() -> dict[str, Any]:
        held = manifest_of(cfg, PromptSets([Prompt("a cat")], [Prompt("a dog")]), None)
        return {"stage": "tilt", "steps": 4, "manifest": json.loads(json.dumps(held))}

    (model / "tiltflow.json").write_text('{"guidance": 1.5}')
    before = facts()
    assert changes(before, facts(), {}) == {}
    (model / "tiltflow.json").write_text('{"guidance": 6.0}')
    name = "guidance of the model's tiltflow.json"
    assert changes(before, facts(), {}) == {name: "1.5 → 6.0"}
    (model / "tiltflow.json").unlink()
    assert changes(before, facts(), {}) == {name: "1.5 → null"}
    del before["manifest"]["side"]  # of an earlier version
    assert changes(before, facts(), {}) == {}
    # of the index, whose flags say how a pipeline samples and encodes
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    told = {"model.is_distilled in model_index.json": "null → true"}
    assert changes(before, facts(), {}) == told
    del before["manifest"]["flags"]
    assert changes(before, facts(), {}) == {}


@pytest.mark.parametrize("setting", ["tilt.terms", "cold_start.objective", "model.family"])
def test_edited_code_of_ones_own_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    module = f"edited_{setting.partition('.')[2]}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{module}.py").write_text("scale = 1\n")
    own = f"{module}:Own"
    value = {own: {}} if setting == "tilt.terms" else own
    recipe = "mixture_cold_start" if setting == "cold_start.objective" else "mixture_tilt"
    cfg = load_config(recipe)
    section, _, key = setting.partition(".")
    part = getattr(cfg, section).model_copy(update={key: value})

    def facts() -> dict[str, Any]:
        code = code_fingerprints(cfg.model_copy(update={section: part}))
        held = {"code": code, "config": {}} | dict.fromkeys([*OF_THE_RUN, *PROMPTS])
        return {"stage": cfg.stage, "steps": 4, "manifest": held}

    before = facts()
    assert list(before["manifest"]["code"]) == [f"{setting} {own}"]
    assert changes(before, facts(), {}) == {}
    (tmp_path / f"{module}.py").write_text("scale = 2\n")
    told = changes(before, facts(), {})
    assert told is not None and list(told) == [f"the code of {setting} {own}"]
    del before["manifest"]["code"]  # of an earlier version
    assert changes(before, facts(), {}) == {}
