"""Damage that a student's contract tells of: other noise levels, LoRAs in each other's places, a
merged pipeline that lost its contract."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import RESOLUTION, Student, request, sampled, student

from tiltflow.data.buckets import Bucket
from tiltflow.formats.contract import Contract, read_contract
from tiltflow.models.pipelines.meta import meta_backbone
from tiltflow.scheduler import CPSFlowMatchScheduler
from tiltflow.setup.model_checks import start_shapes
from tiltflow.setup.starts import Start, load_start
from tiltflow.tasks.depends import asked
from tiltflow.tasks.request import Request
from tiltflow.tasks.systems import Sampler

Tiny = Callable[[str], Path]
Begin = Callable[[Path], Start]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def taught(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Trained at the levels of Z-Image (shift 6), for a LoRA of Z-Image-Turbo (shift 3)."""
    return student(tiny_pipeline, "z_image", tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    out = tmp_path_factory.mktemp("made")
    return student(tiny_pipeline, "sd3m", out, strengths=(0.0, 0.5))


def on_base(taught: Student, **more: Any) -> Request:
    """On the LoRA's own base alone, whose hash is right, without its teacher."""
    return request(taught, model=str(taught.generator), generator_path=None, **more)


def contract_of(made: Student) -> Contract:
    found = read_contract(made.export / "tilt")
    assert found is not None
    return found


def levels_of(wanted: Request) -> list[float]:
    shapes, chosen = meta_backbone(wanted.pipelines.model, resolution=RESOLUTION), wanted.settled
    nothing: Any = None
    sampler = Sampler(nothing, nothing, chosen.steps, levels=chosen.levels)
    found: list[float] = sampler._few_step_levels(shapes).tolist()
    return found


def test_levels_are_those_of_the_training_on_a_base_with_another_scheduler(taught: Student) -> None:
    trained, bare = contract_of(taught), on_base(taught)
    shapes = meta_backbone(bare.pipelines.model, resolution=RESOLUTION)
    assert shapes.few_step_sigmas(4)[1] < trained.sigmas[1] - 0.01
    assert bare.settled.levels == {"64": trained.sigmas}
    assert levels_of(bare) == list(trained.sigmas)
    (note,) = bare.settled.notes
    assert note.startswith("warning: the scheduler in") and note.endswith("the latter are taken")
    assert "gives the noise levels 1, 0.9" in note and "\n" not in note
    whole = request(taught)
    assert whole.settled.levels == {} and whole.settled.notes == ()
    assert asked(bare)["levels"] and "levels" not in asked(whole)


def test_levels_that_a_contract_does_not_say_are_warned_of(taught: Student) -> None:
    for how in ({"steps": 2}, {"resolution": 32}, {"buckets": (Bucket(64), Bucket(32))}):
        wanted = on_base(taught, **how)  # type: ignore[arg-type]
        kept = {"64": contract_of(taught).sigmas} if "buckets" in how else {}
        assert wanted.settled.levels == kept
        note = wanted.settled.notes[-1]
        assert "levels of 4 steps at 64 pixels only" in note and "as --generator" in note
        assert not any("levels" in n for n in request(taught, **how).settled.notes)


def test_a_contracts_levels_are_of_its_steps_and_sizes(taught: Student) -> None:
    own = contract_of(taught)
    assert own.levels(4, 64) == own.sigmas and own.levels(2, 64) is own.levels(4, 32) is None
    for sigmas in (own.sigmas[:-1], (1.0, 0.5, 0.5, 0.2, 0.0), (2.0, 0.9, 0.5, 0.2, 0.0)):
        assert own.model_copy(update={"sigmas": sigmas}).levels(4, 64) is None
    sized = own.model_copy(update={"sizes": (64, 32), "sized_sigmas": {"32": (*own.sigmas[:4], 0)}})
    assert sized.levels(4, 32) == (*own.sigmas[:4], 0)


@pytest.mark.long
def test_images_on_the_base_alone_are_those_of_the_training(taught: Student) -> None:
    assert torch.equal(sampled(on_base(taught, cache="off")), sampled(request(taught, cache="off")))


def test_a_lora_in_the_place_of_another_is_refused(made: Student, tmp_path: Path) -> None:
    few_step, tilt, baked = (made.export / n for n in ("few_step", "tilt", "baked_0.5"))
    early = tmp_path / "cold_start"
    own = contract_of(made)
    first = {"stage": "cold_start", "adapters": {"few_step": own.adapters["few_step"]}}
    resaved(few_step, early, own.model_copy(update=first))
    resaved(few_step, tmp_path / "bare", None)
    for below, above, sentence in (
        (few_step, baked, "--tilt-lora is .*, which holds the few-step adapter too: give it alone"),
        (few_step, made.export / "baked_0", "--tilt-lora is .*, which holds the few-step adapter"),
        (tilt, None, "--few-step is .*, which holds a tilt: it acts on the few-step adapter"),
        (tilt, few_step, "--few-step is .*, which holds a tilt"),
        (tilt, tilt, "--few-step is .*, which holds a tilt"),
        (few_step, few_step, "--tilt-lora is .*, which holds a few-step adapter and no tilt"),
        (few_step, early, "--tilt-lora is .*, which holds a few-step adapter and no tilt"),
        (few_step, tmp_path / "bare", "which holds a few-step adapter and no tilt"),
        (tmp_path / "bare", tmp_path / "bare", "which holds a few-step adapter and no tilt"),
        (baked, tilt, "--few-step is .*, which has its tilt in it at 0.5: give it without"),
    ):
        with pytest.raises(ValueError, match=sentence):
            request(made, few_step=below, tilt_lora=above).settled  # noqa: B018
    for below, above in ((baked, None), (few_step, tilt), (made.export / "baked_0", tilt)):
        assert request(made, few_step=below, tilt_lora=above).settled.notes == ()


@pytest.mark.parametrize("begin", [load_start, start_shapes])
def test_stage_2_begins_from_no_tilt(made: Student, tmp_path: Path, begin: Begin) -> None:
    """A tilt alone is a network that nobody trained; a run of stage 2 without its checkpoints would
    begin without its tilt."""
    few_step, tilt = made.export / "few_step", made.export / "tilt"
    baked, whole = begin(made.export / "baked_0.5"), begin(few_step)
    assert set(baked.few_step) == set(whole.few_step) and whole.fake_score is None
    assert begin(resaved(tilt, tmp_path / "bare", None)).settings == whole.settings
    with pytest.raises(ValueError, match="model.few_step=.* holds a tilt: it acts on the few-step"):
        begin(tilt)
    shutil.copytree(made.export, tmp_path / "run" / "export")
    with pytest.raises(ValueError, match="stage 2's tilt beside the few-step adapter: give .*few_"):
        begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export" / "tilt")
    assert set(begin(tmp_path / "run").few_step) == set(whole.few_step)


def resaved(lora: Path, out: Path, contract: Contract | None, more: float = 0.0) -> Path:
    """A LoRA folder with another contract or none, `more` added to its weights."""
    out.mkdir()
    with safe_open(lora / LORA, framework="pt") as file:
        header = {k: v for k, v in file.metadata().items() if k != "tiltflow"}
    if contract is not None:
        header["tiltflow"] = contract.text()
    save_file({k: v + more for k, v in load_file(lora / LORA).items()}, out / LORA, header)
    return out


def test_a_tilt_that_was_changed_is_said(made: Student, tmp_path: Path) -> None:
    changed = resaved(made.export / "tilt", tmp_path / "changed", contract_of(made), 1e-3)
    (note,) = request(made, tilt_lora=changed).settled.notes
    assert note.endswith("are not those of the tilt in its contract")


@pytest.mark.long
def test_a_few_step_lora_in_other_programs_names_is_the_same(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    """Its hash is another one, and so it passed for another adapter than the tilt's."""
    made = student(tiny_pipeline, "qwen_image", tmp_path, formats=("diffusers", "comfyui"))
    below = tmp_path / "below"
    below.mkdir()
    file = Path(shutil.copy(made.export / "comfyui" / "few_step.safetensors", below))
    assert request(made, few_step=below).settled.notes == ()
    with safe_open(file, framework="pt") as opened:
        header = dict(opened.metadata())
    facts = json.loads(header["tiltflow"])
    facts["adapters"]["few_step"]["hash"] = "another"
    save_file(load_file(file), file, header | {"tiltflow": json.dumps(facts)})
    (note,) = request(made, few_step=below).settled.notes
    assert "trained on another few-step adapter than the one in" in note


def test_a_merged_pipeline_without_a_contract_keeps_to_its_scheduler(
    made: Student, tmp_path: Path
) -> None:
    """As diffusers loads and saves one: contract.json is left behind."""
    model = Path(shutil.copytree(made.model, tmp_path / "resaved"))
    few: dict[str, Any] = {"few_step": None, "tilt_lora": None, "resolution": None}

    def settled(file: dict[str, Any], **more: Any) -> Any:
        scheduler = CPSFlowMatchScheduler(eta=0.3, steps=2, shift=3.0)
        scheduler.save_pretrained(model / "scheduler")
        path = model / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | file))
        return request(made, model=str(model), **few | more).settled

    found = settled({})
    assert (found.steps, found.eta, found.resolution) == (2, 0.3, None)
    (note,) = found.notes
    assert "has no contract.json: its scheduler says steps 2, η 0.3, and the rest" in note
    found = settled({"steps": [1, 2, 8], "size": [32, 64]})
    assert (found.steps, found.eta, found.resolution) == (8, 0.3, (32, 64))
    assert "size 32x64" in found.notes[0]
    found = settled({"size": [9, 32, 32]})  # of a student of videos
    assert found.resolution == (9, 32, 32) and "size 9x32x32" in found.notes[0]
    found = settled({"steps": [1, 2, 8]}, steps=3, eta=0.5)
    assert (found.steps, found.eta) == (3, 0.5)
    assert found.notes[1:] == (
        "warning: --steps is 3, but the student was trained for 1, 2 or 8",
        "warning: --eta is 0.5, but the student was trained for 0.3",
    )
    found = settled({"steps": None, "eta": "much", "size": "wide"})  # said when it is loaded
    assert (found.steps, found.eta, found.notes) == (4, 0.9, ())
    teacher = request(made, **few).settled
    assert (teacher.steps, teacher.eta, teacher.notes) == (4, 0.9, ())
