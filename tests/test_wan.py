"""What is Wan's alone: videos, their decoder and their files; what its pipeline does to prompts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image
from rich.console import Console
from students import PROMPTS, request, sampled, student
from test_scheduler import loaded_pipeline
from torch import Tensor
from transformers import UMT5EncoderModel

import tiltflow
from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.sizes import Resolution, said
from tiltflow.data.buckets import Bucket
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.files import read_evaluation
from tiltflow.formats.card import call_of
from tiltflow.formats.contract import read_contract
from tiltflow.formats.workflow import no_workflow, workflow
from tiltflow.models.families import load_backbone
from tiltflow.models.family import family_named
from tiltflow.models.medium import VIDEOS
from tiltflow.models.pipelines.resized import resized
from tiltflow.setup.checks import Subject, findings
from tiltflow.tasks.evaluate import evaluate, sample_to
from tiltflow.tasks.request import Request, backbone_of, check_request
from tiltflow.tasks.systems import _decode
from tiltflow.tasks.train import run_training

Tiny = Callable[[str], Path]
SIZE = (9, 64, 96)
QUIET = Console(quiet=True)


def load(path: Path, size: Any = SIZE, tokens: int = 64) -> Any:
    return load_backbone(path, device="cpu", resolution=size, max_sequence_length=tokens)


def edited(path: Path, to: Path, file: str, **values: object) -> Path:
    shutil.copytree(path, to)
    config = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**config, **values}))
    return to


def noise(backbone: Any, count: int) -> Tensor:
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_videos_are_the_pipelines_to_the_last_bit(tiny_pipeline: Tiny) -> None:
    backbone = load(tiny_pipeline("wan"))
    channels = backbone.latent_shape[0]
    assert backbone.latent_shape == (channels, 3, 8, 12) and backbone.medium is VIDEOS
    backbone.batched_guidance = False
    x, cond = noise(backbone, 1), backbone.encode(PROMPTS[:1])
    pipe: Any = DiffusionPipeline.from_pretrained(tiny_pipeline("wan"))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPTS[:1],
        num_frames=9,
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=x.clone(),
        max_sequence_length=64,
        output_type="pt",
    ).frames
    solver = UniPCMultistepScheduler.from_config(backbone.scheduler.config)
    solver.set_timesteps(3)
    for t in solver.timesteps:
        sigma = (t.double() / 1000).expand(1)
        v = backbone.velocity(backbone.teacher_base, x, sigma, cond, 4.0)
        x = solver.step(v, t, x, return_dict=False)[0]
    videos = backbone.decode(x)
    assert videos.shape == (1, 9, 3, 64, 96) and videos.std() > 0.03
    assert (videos[:, 1:] - videos[:, :-1]).abs().max() > 0.01
    assert torch.equal(videos, theirs)


@pytest.mark.parametrize("size", [SIZE, (64, 96)], ids=["video", "picture"])
def test_a_decoder_that_recomputes_has_the_same_gradient(tiny_pipeline: Tiny, size: Any) -> None:
    """A block's last frames go on to its next call, and a second pass must not find its own."""
    backbone, found = load(tiny_pipeline("wan_wide"), size), []
    x = noise(backbone, 2)
    for again in (False, True):
        if again:
            backbone.checkpoint_decoder()
        latents = x.clone().requires_grad_(True)
        samples = backbone.decode(latents)
        samples.square().mean().backward()
        found.append((samples.detach(), latents.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_every_time_of_the_solver_is_met(tiny_pipeline: Tiny) -> None:
    backbone = load(tiny_pipeline("wan"), 64)
    solver = UniPCMultistepScheduler.from_config(backbone.scheduler.config)
    solver.set_timesteps(999)
    times = solver.timesteps.unique()
    given: list[Tensor] = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["timestep"]), with_kwargs=True
    )
    rows = torch.zeros(len(times), dtype=torch.long)
    with torch.no_grad():
        x, cond = torch.zeros(len(times), *backbone.latent_shape), backbone.encode(["x"])[rows]
        backbone.velocity(backbone.teacher_base, x, times.double() / 1000, cond)
    hook.remove()
    assert torch.equal(given[0], times.float())


def test_prompts_are_mended_and_zeros_stand_behind_their_ends(tiny_pipeline: Tiny) -> None:
    backbone = load(tiny_pipeline("wan"), 64)
    plain, told = backbone.encode(["it's a cat & dog", "it’s  a cat &amp; dog"]).positive[
        "prompt_embeds"
    ]
    assert torch.equal(plain, told)
    letters = 17  # with the end of the text, and the space before it
    assert plain[:letters].abs().amin(0).max() > 0 and not plain[letters + 1 :].any()


def test_a_package_that_prompts_need_is_missed_before_anything_loads(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text encoder is one of 11 GB."""
    monkeypatch.setattr("tiltflow.models.pipelines.words.find_spec", lambda name: None)
    said = "prompts of Wan 2.1 go through ftfy, without which some .*: pip install ftfy"
    (tmp_path / "p.txt").write_text("a\n")
    values = [
        f"model.path={tiny_pipeline('wan')}", f"data.prompts={tmp_path / 'p.txt'}",
        "adapters.targets=null",
    ]  # fmt: skip
    cfg = load_config("demo_cold_start", [*values, f"run.out={tmp_path / 'run'}", "run.device=cpu"])
    failed = {found.name: str(found.error) for found in findings(Subject(cfg)) if found.failed}
    assert list(failed) == ["packages of prompts"] and re.match(said, failed["packages of prompts"])

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=said):
        load(tiny_pipeline("wan"), 64)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((8, 64, 64), "8x64x64 has 8 frames, but they must be one more than a multiple of 4"),
        ((9, 64, 72), "9x64x72 must be in both sides a positive multiple of 16"),
        ((129, 64, 64), "129x64x64 has 129 frames, and the model in .* has positions for 125"),
        ((0, 64, 64), "0x64x64 has 0 frames, but they must be one more than a multiple of 4"),
    ],
)
def test_sizes_that_are_none(tiny_pipeline: Tiny, size: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(tiny_pipeline("wan"), size)


def test_a_model_of_pictures_makes_no_videos(tiny_pipeline: Tiny) -> None:
    for frames in (9, 0):
        said = rf"={frames}x64x64 is of a video, and the model in .* pictures"
        with pytest.raises(ValueError, match=said):
            load_backbone(tiny_pipeline("sana"), device="cpu", resolution=(frames, 64, 64))


def test_a_size_of_the_other_medium_is_refused(tiny_pipeline: Tiny) -> None:
    """Which a column of the prompt file may have, and several sizes of an evaluation."""
    backbone = load(tiny_pipeline("wan"))
    assert resized(backbone, (5, 64, 64)).latent_shape[1:] == (2, 8, 8)
    with pytest.raises(ValueError, match="the size 64 and 9x64x96: one is of videos and one of"):
        resized(backbone, 64)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((16, 8, 8), [16, 4]), ((16, 3, 8, 8), [5] * 4), ((16, 21, 8, 8), [1] * 20)],
)
def test_what_is_decoded_at_once_is_counted_in_latent_frames(
    shape: tuple[int, ...], parts: list[int]
) -> None:
    """A video of 33 frames takes 3.8 GiB at 480 x 832."""
    seen: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return latents

    role: Any = SimpleNamespace(backbone=SimpleNamespace(decode=decode))
    latents = torch.arange(20.0).view(20, *[1] * len(shape)).expand(20, *shape)
    assert torch.equal(_decode(role, latents), latents) and seen == parts


def test_several_sizes_of_videos_need_no_contract(tiny_pipeline: Tiny) -> None:
    """The model's own size is a picture's, which nobody asked for."""
    buckets = tuple(Bucket(size) for size in ((9, 64, 64), (5, 64, 96)))
    asked = Request(str(tiny_pipeline("wan")), [Prompt("a")], buckets=buckets, device="cpu")
    check_request(asked)
    assert backbone_of(asked, "image").medium is VIDEOS
    mixed = replace(asked, buckets=(*buckets, Bucket(64)))
    with pytest.raises(ValueError, match="--size 64 and 9x64x64: one is of videos and one of"):
        check_request(mixed)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [[(5, 64, 64), (9, 64, 64)], [64, (64, 96)]])
def test_a_teacher_alone_is_evaluated_at_several_sizes(
    tiny_pipeline: Tiny, tmp_path: Path, sizes: list[Resolution]
) -> None:
    """Of videos it was refused: the model's own size, which stood below them, is a picture."""
    names, out = [said(size) for size in sizes], tmp_path / "evaluation.json"
    found = tiltflow.evaluate(
        str(tiny_pipeline("wan")), ["a cat", "a dog"], ["test_wan:plain"], out=out, sizes=sizes,
        teacher_steps=1, steps=1, device="cpu", max_sequence_length=64,
    )  # fmt: skip
    assert list(found.sizes) == names and list(read_evaluation(out)["sizes"]) == names
    mixed = [*sizes, 64 if isinstance(sizes[0], tuple) else (5, 64, 64)]
    with pytest.raises(ValueError, match="one is of videos and one of pictures"):
        tiltflow.evaluate(
            str(tiny_pipeline("wan")), ["a cat", "a dog"], ["test_wan:plain"], sizes=mixed,
            teacher_steps=1, device="cpu", max_sequence_length=64,
        )  # fmt: skip


def test_a_run_makes_videos_or_pictures() -> None:
    values = ["data.prompts=prompts.txt", "run.out=out", "data.buckets=[[9,64,64],64]"]
    with pytest.raises(ValueError, match="has 64: pictures, where model.resolution is of videos"):
        load_config("wan21_1b_cold_start", values)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio=0.9 .* it is of Wan 2.2"),
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps=True"),
        ("transformer/config.json", {"image_dim": 8}, "takes a picture beside the prompt"),
        ("transformer/config.json", {"patch_size": [1, 1, 1]}, r"patches of \[1, 2, 2\]"),
        ("vae/config.json", {"scale_factor_temporal": 8}, "its layers make it 4 and 8"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "is no flow's"),
    ],
)
def test_other_wans_are_refused(
    tiny_pipeline: Tiny, tmp_path: Path, file: str, values: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load(edited(tiny_pipeline("wan"), tmp_path / "m", file, **values), 64)


def bright(images: Tensor, prompts: object, metadata: object) -> Tensor:
    """A differentiable reward of images."""
    return images.flatten(1).mean(1)


bright.differentiable = True  # type: ignore[attr-defined]


def plain(images: Tensor, prompts: object, metadata: object) -> Tensor:
    """A reward of images to hold out."""
    return -images.flatten(1).std(1)


def still(videos: Tensor, prompts: object, metadata: object) -> Tensor:
    """A reward of videos."""
    return -(videos[:, 1:] - videos[:, :-1]).abs().flatten(1).mean(1)


still.domain = "videos"  # type: ignore[attr-defined]


def trained(stage: str, path: Path, out: Path, *more: str) -> dict[str, Tensor]:
    """A run of seconds on videos of nine frames; its weights at its end."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(["a red cat", "two dogs", "x"]))
    own = ["cold_start.generator_every=1"]
    if stage == "tilt":
        rewards = "{test_wan:bright: {weight: 1.0, frames: 3}, test_wan:still: 0.5}"
        own = ["tilt.group_size=4", f"rewards={rewards}"]
    cfg = load_config(
        f"demo_{stage}",
        [
            f"model.path={path}", "model.resolution=[9,64,64]", "model.max_sequence_length=64",
            "model.dtype=fp32", f"data.prompts={prompts}", f"run.out={out}", "run.device=cpu",
            "train.steps=2", "train.batch_size=4", "train.micro_batch_size=2",
            "train.generator_lr=0.01", "train.fake_score_lr=0.01", "adapters.rank=2",
            "adapters.targets=null", "model.autocast=null", "log.samples_every=2",
            "watch.rewards={}", "checkpoint.every=1", *own, *more,
        ],
    )  # fmt: skip
    run_training(cfg, QUIET)
    tensors = load_checkpoint(out).tensors
    return {f"{g}/{k}": t for g, group in tensors.items() for k, t in dict(group).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.long
def test_both_stages_train_on_videos_resume_and_are_evaluated(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    model = tiny_pipeline("wan")
    trained("cold_start", model, tmp_path / "cold")
    below = f"model.few_step={tmp_path / 'cold'}"
    watched = [
        "watch.rewards={test_wan:plain: {weight: 1.0, frames: 2}}", "watch.every=2",
        "watch.prompts=8", "watch.teacher_images=8", "watch.teacher_steps=2",
    ]  # fmt: skip
    whole = trained("tilt", model, tmp_path / "whole", below, *watched)
    assert any("ema/" in key and "lora_B" in key and value.any() for key, value in whole.items())
    again = (below, "model.gradient_checkpointing=true")
    trained("tilt", model, tmp_path / "parts", *again, "train.steps=1")
    assert same(whole, trained("tilt", model, tmp_path / "parts", *again, "run.resume=true"))
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert '"watch/motion"' in rows and '"held_out/test_wan:plain"' in rows
    sheet = Image.open(tmp_path / "whole" / "samples" / "step-000002.png")
    assert sheet.size[0] % (3 * 64) == 0  # first, middle and last frame side by side

    export = tmp_path / "whole" / "export"
    asked = request_of(model, export, ["a red cat", "two dogs", "x"])
    found = evaluate(asked).summary["systems"]
    assert {"test_wan:bright", "test_wan:still"} <= set(found["rtdmd"]["scores"])
    files = sample_to(asked, tmp_path / "videos")
    assert [Image.open(file).n_frames for file in files] == [9, 9, 9]  # type: ignore[attr-defined]


def request_of(model: Path, export: Path, prompts: list[str]) -> Request:
    return Request(
        model=str(model),
        prompts=[Prompt(text) for text in prompts],
        few_step=export / "few_step",
        tilt_lora=export / "tilt",
        teacher_steps=2,
        device="cpu",
        rewards={"test_wan:bright": None, "test_wan:still": None},
    )


@pytest.mark.long
def test_the_cards_call_makes_the_videos_of_sample(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    made = student(tiny_pipeline, "wan21_1b", tmp_path, size=SIZE)
    contract = read_contract(made.export / "tilt")
    assert contract is not None and contract.resolution == SIZE
    sampler = json.loads((made.export / "scheduler" / "scheduler_config.json").read_text())
    assert sampler["size"] == list(SIZE)  # what a merged pipeline without its contract goes by
    call, card = call_of(contract, family_named("wan")), (made.export / "README.md").read_text()
    assert call["num_frames"] == 9 and "pipeline_tag: text-to-video" in card
    assert ", ".join(f"{key}={value!r}" for key, value in call.items()) + ").frames" in card
    pipe = loaded_pipeline(made, 0.7)
    seeded = pipe.scheduler.seed(11, images=len(PROMPTS))
    given = {**call, "prompt": list(PROMPTS), "generator": seeded, "output_type": "pt"}
    theirs = pipe(**given).frames
    asked = [Prompt(text) for text in PROMPTS]
    ours = sampled(request(made, tilt=0.7, seed=11, resolution=None, prompts=asked))
    assert ours.shape == (len(PROMPTS), 9, 3, 64, 96) and ours.std() > 0.01
    assert torch.equal(ours, theirs)

    assert "24 text tokens, where ComfyUI has 512" in str(no_workflow(contract))
    whole = contract.model_copy(update={"max_sequence_length": 512})
    assert no_workflow(whole) is None
    nodes = {node["class_type"]: node["inputs"] for node in workflow(whole).values()}
    assert nodes["EmptyHunyuanLatentVideo"]["length"] == 9 and "SaveAnimatedWEBP" in nodes
