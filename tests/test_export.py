"""Exports: without training code, merged, of full copies, with a card; one base in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from students import (
    MERGED,
    MODELS,
    PROMPTS,
    RESOLUTION,
    TOKENS,
    random_like,
    request,
    sampled,
    student,
)
from torch import nn
from transformers.utils import logging as transformers_logging

from tiltflow.core.checkpoint import Checkpoint
from tiltflow.core.sizes import said as said_size
from tiltflow.data.prompts import Prompt
from tiltflow.formats.contract import read_contract
from tiltflow.formats.wanted import Wanted
from tiltflow.formats.writing import save_adapter
from tiltflow.models.families import load_backbone
from tiltflow.models.roles import AdapterSettings, adapter_roles, copy_roles
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.evaluate import prepare
from tiltflow.tasks.export import export_checkpoint, export_run

Tiny = Callable[[str], Path]
SRC = Path(__file__).parents[1] / "src"

FRESH = """
import json, sys
class OnlyInference:
    allowed = {"tiltflow", "tiltflow.scheduler", "tiltflow.flow", "tiltflow.core"}
    allowed |= {"tiltflow.core.randomness"}
    def find_spec(self, name, path=None, target=None):
        if name.startswith("tiltflow") and name not in self.allowed:
            raise ImportError(name + " is not for inference")
sys.meta_path.insert(0, OnlyInference())
import torch
from diffusers import DiffusionPipeline
from tiltflow.scheduler import CPSFlowMatchScheduler
for job in json.load(sys.stdin):
    if job["merged"]:
        pipe = DiffusionPipeline.from_pretrained(job["export"] + "/merged")
    else:
        pipe = DiffusionPipeline.from_pretrained(job["base"])
        for name in ("few_step", "tilt"):
            pipe.load_lora_weights(job["export"] + "/" + name, adapter_name=name)
        pipe.set_adapters(["few_step", "tilt"], [1.0, job["tilt"]])
        pipe.scheduler = CPSFlowMatchScheduler.from_pretrained(job["export"] + "/scheduler")
    noise = pipe.scheduler.seed(job["seed"], images=len(job["prompts"]))
    images = pipe(prompt=job["prompts"], generator=noise, output_type="pt", **job["call"]).images
    torch.save(images, job["out"])
try:
    import tiltflow.training
except ImportError:
    print("inference only")
"""


def call(name: str) -> dict[str, Any]:
    size = {"height": RESOLUTION, "width": RESOLUTION}
    # what its pipeline's call takes for a pass without guidance, at the size that is asked for
    own = {
        "z_image": {"guidance_scale": 0.0},
        "krea2": {"guidance_scale": 0.0},
        "sana": {"use_resolution_binning": False},
    }
    return {
        "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": TOKENS, **size,
        **own.get(name, {}),
    }  # fmt: skip


@pytest.mark.long
def test_a_fresh_process_without_training_code_gives_the_same_images(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    """Difference 0 in fp32 for the LoRA folders; the merged sums round differently."""
    jobs, ours = [], []
    for name in (
        "sd35m", "flux1_dev", "flux2_klein_4b", "z_image", "sana", "chroma", "qwen_image", "krea2",
        "flux2_dev",
    ):  # fmt: skip
        made = student(tiny_pipeline, name, tmp_path / name, formats=MERGED, strengths=(0.6,))
        # several prompts in one call are padded to each other by Qwen-Image's, which rounds
        prompts = PROMPTS[:1] if name == "qwen_image" else PROMPTS
        asked = [Prompt(text, {}) for text in prompts]
        expected = sampled(request(made, tilt=0.6, seed=5, prompts=asked))
        for merged in (False, True):
            out = str(tmp_path / f"{name}-{merged}.pt")
            jobs.append(
                {"merged": merged, "base": str(made.base), "export": str(made.export), "out": out,
                 "tilt": 0.6, "seed": 5, "prompts": prompts, "call": call(name)}
            )  # fmt: skip
            ours.append(expected)
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(jobs),
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "inference only" in done.stdout, done.stderr[-2000:]
    for job, expected in zip(jobs, ours, strict=True):
        theirs = torch.load(str(job["out"]), weights_only=True)
        difference = (theirs - expected).abs().max()
        assert difference == 0 if not job["merged"] else 0 < difference < 1e-3, job


@pytest.mark.filterwarnings("error:Already found a")  # of two adapters, which are meant
def test_a_merged_pipeline_is_a_system_by_itself(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    made = student(tiny_pipeline, "sd3m", tmp_path, formats=MERGED)
    expected = sampled(request(made, seed=2))
    merged = request(made, seed=2, model=str(made.export / "merged"), few_step=None, tilt_lora=None)
    assert (sampled(merged) - expected).abs().max() < 1e-3
    loaded, sampler = prepare(merged)
    assert [(s.name, s.nfe) for s in sampler.systems(loaded)] == [("merged", 4)]
    with pytest.raises(ValueError, match="merged in: give no --few-step"):
        prepare(request(made, model=str(made.export / "merged")))


def test_full_fine_tuning_exports_merged(
    tiny_pipeline: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = student(tiny_pipeline, "sd3m", tmp_path)
    backbone: Any = load_backbone(made.model, device="cpu", resolution=RESOLUTION)
    roles = copy_roles(backbone, seed=0)
    weights = {k: v + 0.01 * torch.randn_like(v) for k, v in roles.ema.state().items()}
    checkpoint = Checkpoint(3, {"ema": weights}, {"stage": "cold_start", "adapters": None})
    with pytest.raises(ValueError, match="full copies .* export it with --merged"):
        export_checkpoint(made.config, checkpoint, tmp_path / "out")
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    paths = export_checkpoint(made.config, checkpoint, tmp_path / "out", Wanted(("merged",)))
    assert capfd.readouterr().err == ""  # the libraries draw no bars
    assert [p.name for p in paths] == [
        "scheduler", "merged", "transformer.safetensors", "workflow.json", "README.md"
    ]  # fmt: skip
    roles.generator.load(weights)
    loaded, _ = prepare(
        request(made, model=str(tmp_path / "out" / "merged"), few_step=None, tilt_lora=None)
    )
    state = loaded.backbone.student_base.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lora" not in card
    assert (
        "Here are the merged pipeline `merged/`, its sampler `scheduler/`, files for other" in card
    )


def test_the_card(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    scores = {"mean": 0.3, "ci95": [0.2, 0.4]}
    evaluation = {
        "prompts": 10,
        "systems": {"rtdmd": {"nfe": 4, "scores": {"clipscore": scores}}},
        "comparisons": [],
    }  # fmt: skip
    made = student(tiny_pipeline, "flux1_dev", tmp_path, evaluation=evaluation)
    text = (made.export / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\n") and "base_model: flux_dev  #" in text
    for part in (
        "pipe = FluxPipeline.from_pretrained(",
        'pipe.load_lora_weights("tilt", adapter_name="tilt")',
        "num_inference_steps=4, guidance_scale=1.0, height=64, width=64, max_sequence_length=24",
        "| learning rates | generator 3e-06, fake score 1e-06 |",
        "| rewards | clipscore × 1, hpsv2 × 1, pickscore × 1, geneval × 1 |",
        "| rtdmd | 4 | 0.3000 [0.2000, 0.4000] |",
    ):
        assert part in text, part
    plain = student(tiny_pipeline, "sd3m", tmp_path / "sd3")
    text = (plain.export / "README.md").read_text()
    assert "Not evaluated" in text and "guidance_scale=1.0" in text
    assert {p.name for p in plain.export.iterdir()} == {
        "few_step", "tilt", "scheduler", "README.md", "contract.json"
    }  # fmt: skip


@pytest.mark.parametrize("strengths", [(0.7,), (0.0, 1.0)])
def test_the_card_says_how_strong_the_merged_tilt_is(
    tiny_pipeline: Tiny, tmp_path: Path, strengths: tuple[float, ...]
) -> None:
    """And says nothing of LoRA folders that are not there. The figures are of strength 1."""
    score = {"nfe": 4, "scores": {"clipscore": {"mean": 0.3, "ci95": [0.2, 0.4]}}}
    evaluation = {"prompts": 9, "systems": {"rtdmd": score}, "asked": {"tilt": 1.0}}
    options = {"formats": ("merged",), "strengths": strengths, "evaluation": evaluation}
    made = student(tiny_pipeline, "sd3m", tmp_path, **options)
    text = (made.export / "README.md").read_text()
    if len(strengths) == 1:
        assert "the merged pipeline `merged/` (tilt 0.7)" in text
        assert "transformer in fp32, with the tilt at 0.7, in the layout" in text
    else:
        assert "pipelines `merged_0/` (tilt 0) and `merged_1/` (tilt 1)" in text
        assert "`workflow_0.json` and `workflow_1.json` beside `transformer_…" in text
        assert {"workflow_0.json", "workflow_1.json"} < {
            file.name for file in (made.export / "original").iterdir()
        }
        assert "with the tilt at 0 and 1, in the layout" in text
    assert "`rtdmd` has the tilt at 1." in text
    assert "LoRA folder" not in text


def test_bad_exports(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run directory"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_text("stage: cold_start\n")
    with pytest.raises(ValueError, match="--tilt is 2"):
        export_run(tmp_path, tmp_path / "out", Wanted(strengths=(2.0,)))
    with pytest.raises(ValueError, match=r"two strengths that both read 0\.123457"):
        Wanted.of(tilt="0.1234567,.5,0.12345671")


def test_a_checkpoint_of_another_model_is_not_exported(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """Put into the run's folder by hand, or the base was replaced since: no file is written."""
    made, out = student(tiny_pipeline, "sd3m", tmp_path / "a"), tmp_path / "out"
    other = student(tiny_pipeline, "flux1_dev", tmp_path / "b").checkpoint
    tensors, state = made.checkpoint.tensors, made.checkpoint.state
    narrow = {k: w[:, :-1] if "lora_A" in k else w for k, w in tensors["ema"].items()}
    ranked = {**state, "adapters": {**state["adapters"], "rank": 4}}
    based = {**state, "manifest": {"base": "0" * 64, "generator_base": None}}
    for checkpoint, said in (
        (other, "the checkpoint's few_step is of another model: on .*, and the base has none"),
        (Checkpoint(3, {**tensors, "ema": narrow}, state), "checkpoint's tilt is of another model"),
        (Checkpoint(3, tensors, ranked), "checkpoint's tilt says that its rank is 4, but on .* 2"),
        (Checkpoint(3, tensors, based), "holds other weights .* than the run was trained on .0000"),
    ):
        for formats in (("diffusers",), ("comfyui", "kohya", "peft"), ("merged",)):
            with pytest.raises(ValueError, match=said):
                export_checkpoint(made.config, checkpoint, out, Wanted(formats))
            assert not out.exists()
    hashed = read_contract(made.export / "tilt")
    assert hashed is not None
    based["manifest"] = {"base": hashed.base.hash, "generator_base": None}
    assert export_checkpoint(made.config, Checkpoint(3, tensors, based), out)


def test_an_adapter_that_no_step_has_reached_is_said(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    made, said = student(tiny_pipeline, "sd3m", tmp_path), Notices()
    tensors, state = made.checkpoint.tensors, made.checkpoint.state
    export_checkpoint(made.config, made.checkpoint, tmp_path / "out", callbacks=said)
    assert said.lines == []
    zero = {k: torch.zeros_like(w) if "lora_B" in k else w for k, w in tensors["ema"].items()}
    began = Checkpoint(3, {**tensors, "ema": zero}, state)
    export_checkpoint(made.config, began, tmp_path / "out", callbacks=said)
    (line,) = said.lines
    assert line.startswith(
        "tilt is as it began, all zeros: in 3 iterations the generator's average"
    )


def test_the_card_has_no_figures_of_an_earlier_student(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """A run that was evaluated, and then went on: the figures are not of what is exported."""
    made, said = student(tiny_pipeline, "sd3m", tmp_path), Notices()
    adapters = dict(request(made).settled.adapters)
    assert set(adapters) == {"few_step", "tilt"}
    score = {"nfe": 4, "scores": {"clipscore": {"mean": 0.3, "ci95": [0.2, 0.4]}}}
    evaluation = {
        "prompts": 9, "systems": {"rtdmd": score}, "adapters": adapters, "asked": {"tilt": 0.7},
    }  # fmt: skip

    def card(checkpoint: Checkpoint) -> str:
        out = tmp_path / "out"
        export_checkpoint(made.config, checkpoint, out, None, evaluation, callbacks=said)
        return (out / "README.md").read_text()

    text = card(made.checkpoint)
    assert "| rtdmd | 4 | 0.3000 [0.2000, 0.4000] |" in text and said.lines == []
    assert "Means over 9 prompts, with 95% intervals. `rtdmd` has the tilt at 0.7." in text
    tensors, state = made.checkpoint.tensors, made.checkpoint.state
    later = {**tensors, "ema": {k: 2 * w for k, w in tensors["ema"].items()}}
    assert "Not evaluated" in card(Checkpoint(6, later, state))
    assert said.lines[0].startswith("evaluation.json is of other weights than this checkpoint's")
    evaluation["adapters"] = {"few_step": adapters["few_step"]}  # stage 1's alone: it is the same
    assert "Not evaluated" not in card(Checkpoint(6, later, state)) and len(said.lines) == 1


def test_the_card_says_where_its_figures_are_not_of_what_was_trained_for(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    made = student(tiny_pipeline, "sd3m", tmp_path)
    score = {"nfe": 4, "scores": {"clipscore": {"mean": 0.3, "ci95": [0.2, 0.4]}}}

    def said(**asked: Any) -> str:
        evaluation = {"prompts": 9, "systems": {"rtdmd": score}, "asked": asked}
        out = tmp_path / "out"
        export_checkpoint(made.config, made.checkpoint, out, None, evaluation)
        return (out / "README.md").read_text().partition("## Scores")[2].partition("| system")[0]

    settled = request(made).settled
    names = ("steps", "eta", "resolution", "max_sequence_length")
    trained = {name: getattr(settled, name) for name in names}
    trained["student_guidance"] = settled.guidance
    as_trained = "Means over 9 prompts, with 95% intervals."
    assert said(**trained).strip() == said().strip() == as_trained
    other = {"steps": 7, "eta": 0.0, "student_guidance": 3.5, "max_sequence_length": 9}
    text = said(**trained | other | {"resolution": [64, 48]})
    for what in ("7 steps", "η = 0", "guidance 3.5", "64x48 pixels", "9 text tokens"):
        assert f"The students were sampled with {what}, but this one was trained for" in text
    assert text.count("The students were sampled") == 5 and f"trained for {settled.eta:g}." in text
    size = said_size(settled.resolution)
    text = said(**trained | {"sizes": [[size, None], ["64x48", None]]})
    assert f"sampled with 64x48 pixels, but this one was trained for {size}." in text


class Notices(Callbacks):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        self.lines.append(text)


def test_a_lora_of_another_model_is_one_sentence(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    made = student(tiny_pipeline, "sd3m", tmp_path)
    settings = AdapterSettings(2, 4.0, ["attn.to_q"])
    backbone: Any = load_backbone(tiny_pipeline("flux_dev"), device="cpu", resolution=RESOLUTION)
    wrong = adapter_roles(backbone, settings, seed=0).generator.state()
    pipeline = type(backbone.pipe)
    save_adapter(pipeline, random_like(wrong, 0), settings, tmp_path / "of_flux")
    right = adapter_roles(load_backbone(made.model, device="cpu"), settings, seed=0)
    deeper = {k.replace("blocks.2.", "blocks.7."): v for k, v in right.generator.state().items()}
    save_adapter(pipeline, deeper, settings, tmp_path / "of_a_larger_model")
    for name in ("of_flux", "of_a_larger_model"):
        with pytest.raises(ValueError, match=f"LoRA in .*{name} ") as caught:
            prepare(request(made, few_step=tmp_path / name, tilt_lora=None))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "nfe"), [("flux1_dev", 3), ("sd3m", 6), ("flux2_klein_4b", 6)])
def test_guidance_as_an_input_costs_no_second_pass(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, nfe: int
) -> None:
    """NFE as counted, against the samples that really go through the teacher."""
    made = student(tiny_pipeline, name, tmp_path)
    loaded, sampler = prepare(request(made, teacher_steps=3))
    systems = {s.name: s for s in sampler.systems(loaded)}
    assert [s.nfe for s in systems.values()] == [nfe, nfe // 3 * 4, 4, 4]
    seen: list[int] = []
    for which, system in (("teacher", systems["teacher"]), ("rtdmd", systems["rtdmd"])):
        base = loaded.backbone.teacher_base if which == "teacher" else loaded.backbone.student_base
        hook = base.register_forward_pre_hook(
            lambda _, __, values: seen.append(len(values["hidden_states"])), with_kwargs=True
        )
        system.sample([0])
        hook.remove()
        assert sum(seen) == system.nfe
        seen.clear()


def unique(*modules: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


@pytest.mark.parametrize("name", ["sd35m", "flux1_dev", "flux2_klein_4b"])
def test_copies_of_the_transformer_in_memory(tiny_pipeline: Tiny, name: str) -> None:
    """One (klein: two) and the adapters of stage 2, against four or five with full fine-tuning."""
    base, generator = MODELS[name]

    def load() -> Any:
        second = tiny_pipeline(generator) if generator else None
        return load_backbone(
            tiny_pipeline(base), generator_path=second, device="cpu", resolution=RESOLUTION
        )

    backbone = load()
    one = unique(backbone.teacher_base)
    bases = 2 if generator else 1
    assert unique(backbone.teacher_base, backbone.student_base) == bases * one
    settings = AdapterSettings(2, 4.0, backbone.lora_targets())
    state = adapter_roles(load(), settings, seed=0).generator.state()
    roles = adapter_roles(backbone, settings, seed=0, few_step=(settings, state))
    every = [roles.teacher, roles.generator, roles.fake_score, roles.ema, roles.reference]
    adapter = sum(v.numel() for v in state.values())
    assert unique(*(r.network for r in every if r)) == bases * one + 4 * adapter
    copies = copy_roles(load(), seed=0)
    every = [copies.teacher, copies.generator, copies.fake_score, copies.ema]
    assert unique(*(r.network for r in every if r)) == 4 * one
