"""Pipelines of other sizes: their own calls, absent text encoders, and the whole way of a run."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import PROMPTS, Tiny, noise
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from tiltflow.cli.main import app
from tiltflow.config.load import load_config
from tiltflow.flow import euler_step
from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.files import absent_parts, check_pipeline
from tiltflow.tasks.plans import plan_recipe

TOKENS = 20

# pipeline, image side, what its call is given without guidance and with, and our guidance
CALLS: list[tuple[str, int, dict[str, Any], float]] = [
    ("other_sd3", 24, {"guidance_scale": 1.0}, 1.0),
    ("other_sd3", 40, {"guidance_scale": 5.0}, 5.0),
    ("other_sd3_patch_4", 24, {"guidance_scale": 1.0}, 1.0),
    ("other_flux", 24, {"guidance_scale": 3.5}, None),
    ("other_flux", 24, {"guidance_scale": 1.0}, 1.0),
    ("other_flux", 24, {"guidance_scale": 2.0}, 2.0),
    ("other_flux_without_guidance", 40, {}, 1.0),
    ("other_flux_without_guidance", 24, {"true_cfg_scale": 3.0, "negative_prompt": ""}, 3.0),
    ("other_klein", 24, {"guidance_scale": 1.0}, 1.0),
    ("other_klein", 40, {"guidance_scale": 4.0}, 4.0),
]


def load(path: Path, side: int, **options: Any) -> Any:
    return load_backbone(path, device="cpu", resolution=side, max_sequence_length=TOKENS, **options)


@torch.no_grad()
def our_images(backbone: Any, prompts: list[str], guidance: float | None) -> Tensor:
    x, cond = noise(backbone, len(prompts)), backbone.encode(prompts)
    for now, then in pairwise(backbone.teacher_sigmas(3)):
        level = now.expand(len(x))
        v = backbone.velocity(backbone.teacher_base, x, level, cond, guidance)
        x = euler_step(x, v, level, then.expand(len(x)))
    return backbone.decode(x)


@pytest.mark.parametrize(("name", "side", "call", "guidance"), CALLS)
def test_loop_equals_the_pipelines_call(
    tiny_pipeline: Tiny, name: str, side: int, call: dict[str, Any], guidance: float | None
) -> None:
    """Difference 0, once the weights are marked as the pipeline's own are."""
    path, prompts = tiny_pipeline(name), PROMPTS[: 2 if guidance in (None, 1) else 1]
    backbone = load(path, side)
    backbone.thaw()
    backbone.batched_guidance = backbone.family == "sd3"  # as the pipelines do it
    images = our_images(backbone, prompts, guidance)
    pipe: Any = DiffusionPipeline.from_pretrained(path, **absent_parts(path))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=prompts,
        height=side,
        width=side,
        num_inference_steps=3,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **call,
    ).images
    assert images.shape == (len(prompts), 3, side, side) and theirs.std() > 0.05
    assert (images - theirs).abs().max() == 0


class Operations(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_frozen_weights_take_other_products(tiny_pipeline: Tiny) -> None:
    """Why sampling thaws: the autoencoder's attention is folded by its weights' `requires_grad`.

    So it rounds otherwise, though not on every CPU.
    """
    backbone = load(tiny_pipeline("other_sd3"), 24)
    x = noise(backbone, 2)
    with torch.no_grad():
        with Operations() as one:
            frozen = backbone.decode(x)
        backbone.thaw()
        with Operations() as other:
            thawed = backbone.decode(x)
    assert one.names != other.names
    assert (thawed - frozen).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("other_sd3_without_clip_l", {"text_encoder_2": (16, 40)}),
        ("other_sd3_without_clip_g", {"text_encoder": (0, 16)}),
        ("other_sd3_t5_alone", {}),
    ],
)
def test_an_absent_clip_is_zeros_in_its_place(
    tiny_pipeline: Tiny, name: str, places: dict[str, tuple[int, int]]
) -> None:
    """The CLIP that is there gives what it gives by itself, in its own columns; all else is 0."""
    backbone = load(tiny_pipeline(name), 24)
    cond = backbone.encode(PROMPTS).positive
    tokens, pooled = cond["prompt_embeds"], cond["pooled_prompt_embeds"]
    length = backbone.pipe.tokenizer_max_length
    assert length == (16 if places else 77)  # the pipeline's own default without a CLIP
    shapes = {key: tuple(value.shape[1:]) for key, value in cond.items()}
    assert shapes == backbone.conditioning_shapes()
    expected, whole = torch.zeros(2, length, 48), torch.zeros(2, 40)
    for encoder, (begin, end) in places.items():
        tokenizer = getattr(backbone.pipe, encoder.replace("text_encoder", "tokenizer"))
        ids = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            out = getattr(backbone.pipe, encoder)(ids, output_hidden_states=True)
        expected[..., begin:end], whole[:, begin:end] = out.hidden_states[-2], out.text_embeds
    assert torch.equal(tokens[:, :length], expected) and torch.equal(pooled, whole)
    assert tokens[:, length:].std() > 0.01  # T5's
    backbone.free_text_encoders()
    with pytest.raises(RuntimeError, match="were freed"):
        backbone.encode(PROMPTS)


def edited(folder: Path, part: str, to: Path, **changes: Any) -> Path:
    copy = shutil.copytree(folder, to)
    content = json.loads((copy / part).read_text())
    (copy / part).write_text(json.dumps({**content, **changes}))
    return copy


def test_sizes_that_do_not_go_together(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    klein, flux = tiny_pipeline("other_klein"), tiny_pipeline("other_flux")
    with pytest.raises(ValueError, match="has 20 layers, but klein is .* states 9, 18, 27"):
        load(tiny_pipeline("other_klein_short"), 24)
    wide = edited(klein, "text_encoder/config.json", tmp_path / "wide", hidden_size=40)
    with pytest.raises(ValueError, match="joint_attention_dim=72, which is not 3 × hidden_size=40"):
        load(wide, 24)
    with pytest.raises(ValueError, match="has no shift_factor"):
        load(edited(flux, "vae/config.json", tmp_path / "shift", shift_factor=None), 24)
    index, gone = "model_index.json", [None, None]
    silent = edited(
        tiny_pipeline("other_sd3_t5_alone"), index, tmp_path / "silent", text_encoder_3=gone
    )
    with pytest.raises(ValueError, match="lists no text encoder"):
        check_pipeline(silent)
    headless = edited(flux, index, tmp_path / "headless", text_encoder=gone)
    shutil.rmtree(headless / "text_encoder")
    with pytest.raises(ValueError, match=r": text_encoder/config\.json, .* missing"):
        check_pipeline(headless)
    ddim = edited(flux, index, tmp_path / "ddim", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(ValueError, match="has a DDIMScheduler, but it needs a FlowMatchEuler"):
        check_pipeline(ddim)
    narrow = edited(
        tiny_pipeline("other_sd3_without_clip_l"), "transformer/config.json",
        tmp_path / "narrow", pooled_projection_dim=24,
    )  # fmt: skip
    file = narrow / "transformer" / "diffusion_pytorch_model.safetensors"
    weights, key = load_file(file), "time_text_embed.text_embedder.linear_1.weight"
    save_file({**weights, key: weights[key][:, :24].contiguous()}, file)  # as narrow as it says
    with pytest.raises(ValueError, match="no room for text_encoder, which is absent"):
        load(narrow, 24, parts="text")


def run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output[-1000:]


REWARD = "test_train:redness"


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "recipe", "dtype"),
    [
        ("other_sd3_without_clip_l", "sd35m", "bf16"),
        ("other_flux_without_guidance", "flux1_dev", "fp32"),
        ("other_klein", "flux2_klein_4b", "bf16, model.base_storage=fp8"),
    ],
)
def test_the_whole_way_of_a_run(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, recipe: str, dtype: str
) -> None:
    """Both stages, sampling, evaluation, export and the planner, through the command line."""
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na bird\n")
    prompts, model = tmp_path / "prompts.txt", tiny_pipeline(name)
    settings = [
        f"model.path={model}", "model.generator_path=null", "model.guidance=null",
        "model.resolution=24", "model.max_sequence_length=20", *f"model.dtype={dtype}".split(", "),
        f"data.prompts={prompts}", "adapters.rank=2", "train.batch_size=4", "train.steps=1",
        "train.micro_batch_size=2", "log.samples=2", "log.samples_every=1", "run.device=cpu",
    ]  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    run("train", f"{recipe}_cold_start", *settings, "cold_start.generator_every=1",
        f"run.out={first}")  # fmt: skip
    reward = f"rewards={{'{REWARD}': {{weight: 1.0, options: {{differentiable: true}}}}}}"
    tilt = [*settings, "tilt.group_size=2", f"model.few_step={first}", reward, "watch.rewards={}"]
    run("train", f"{recipe}_tilt", *tilt, f"run.out={second}")
    assert plan_recipe(load_config(f"{recipe}_tilt", tilt)).peak > 0
    loras = second / "export"
    given = [
        "--model", model, "--few-step", loras / "few_step", "--tilt-lora", loras / "tilt",
        "--tilt", "0.5", "--resolution", "24", "--max-sequence-length", "20",
        "--prompts", prompts, "--device", "cpu",
    ]  # fmt: skip
    run("sample", *given, "--out", tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    figures = tmp_path / "evaluation.json"
    run("evaluate", *given, "--reward", REWARD, "--teacher-steps", "2", "--json", figures)
    systems = json.loads(figures.read_text())["systems"]
    assert list(systems) == ["teacher", "teacher_4_step", "ac_dmd", "rtdmd"]
    run("export", second, "--out", tmp_path / "out", "--merged")
    assert (tmp_path / "out" / "merged" / "model_index.json").is_file()
