"""Pictures that are not square: against each pipeline's own call, in training and in an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import PROMPTS, Tiny, load
from PIL import Image
from rich.console import Console
from students import TOKENS, Student, request, sampled, student
from test_backbones import our_images, pipeline
from test_scheduler import loaded_pipeline
from typer.testing import CliRunner

from tiltflow.cli.main import app
from tiltflow.config.load import dump_config, load_config
from tiltflow.core.sizes import both, parse_size, plain, said
from tiltflow.data.buckets import Bucket
from tiltflow.formats.contract import Contract, read_contract
from tiltflow.formats.wanted import Wanted
from tiltflow.scheduler import latent_shape
from tiltflow.tasks.export import export_checkpoint
from tiltflow.tasks.train import run_training

SIZES = [(64, 96), (96, 32)]
OURS = {"sd3m": 1.0, "sd35m": 4.5, "flux_dev": 3.5, "klein_base": 4.0, "z_image": 1.0}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", SIZES)
def test_loop_equals_the_pipelines_call(
    tiny_pipeline: Tiny, name: str, size: tuple[int, int]
) -> None:
    """Images and grids: a shift that depends on the number of tokens follows the size."""
    path, (height, width), guidance = tiny_pipeline(name), size, OURS[name]
    backbone = load(path, resolution=size)
    backbone.batched_guidance = backbone.family == "sd3"
    pipe = pipeline(path)
    expected = pipe(
        prompt=PROMPTS[:1], height=height, width=width, num_inference_steps=3,
        max_sequence_length=backbone.sequence, generator=torch.Generator().manual_seed(3),
        output_type="pt", guidance_scale=guidance - backbone.record.guidance_offset,
    ).images  # fmt: skip
    assert torch.equal(backbone.teacher_sigmas(3), pipe.scheduler.sigmas)
    images = our_images(backbone, PROMPTS[:1], 3, guidance)
    assert images.shape == (1, 3, height, width) and images.std() > 0.05
    assert (images - expected).abs().max() == 0
    turned = load(path, resolution=(width, height))
    assert torch.equal(turned.few_step_sigmas(4), backbone.few_step_sigmas(4))
    if name == "flux_dev":
        larger = load(path, resolution=(4 * height, 4 * width))
        assert bool((larger.few_step_sigmas(4)[1:-1] > backbone.few_step_sigmas(4)[1:-1]).all())


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Student]:
    """A student of a tiny pipeline, exported as one that was trained for 64 × 96 pixels."""

    def get(name: str) -> Student:
        out = tmp_path_factory.mktemp(name)
        square = student(tiny_pipeline, name, out)
        model = square.config.model.model_copy(update={"resolution": (64, 96)})
        config = square.config.model_copy(update={"model": model})
        export_checkpoint(config, square.checkpoint, out / "export")
        return replace(square, config=config)

    return get


@pytest.mark.parametrize("name", ["sd3m", "flux1_dev", "flux2_klein_4b"])
def test_an_exported_student_in_its_pipeline_gives_the_images_of_sample(
    made: Callable[..., Student], name: str
) -> None:
    trained = made(name)
    contract = read_contract(trained.export / "tilt")
    assert contract is not None and contract.resolution == (64, 96)
    assert "64x96 pixels" in (trained.export / "README.md").read_text()
    pipe = loaded_pipeline(trained, 0.7)

    def theirs(height: int, width: int, **size: Any) -> torch.Tensor:
        images: torch.Tensor = pipe(
            prompt=PROMPTS, height=height, width=width, max_sequence_length=TOKENS,
            num_inference_steps=4, guidance_scale=1.0, output_type="pt",
            generator=pipe.scheduler.seed(11, images=2, **size),
        ).images  # fmt: skip
        return images

    asked = request(trained, tilt=0.7, seed=11, resolution=None)
    ours = sampled(asked)
    assert ours.shape == (2, 3, 64, 96) and (ours - theirs(64, 96)).abs().max() == 0
    turned = sampled(replace(asked, resolution=(96, 32)))
    assert (turned - theirs(96, 32, size=(96, 32))).abs().max() == 0
    square = sampled(replace(asked, resolution=64))
    assert (square - theirs(64, 64)).abs().max() == 0
    assert replace(asked, resolution=(96, 32)).settled.notes[0] == (
        "warning: --size is 96x32, but the student was trained for 64x96"
    )


def test_a_student_of_several_sizes_names_all_of_them(
    made: Callable[..., Student], tmp_path: Path
) -> None:
    """Its call is at one that it was trained for, and the levels of the others stand beside."""
    trained = made("flux1_dev")
    state = {**trained.checkpoint.state, "sizes": [[96, 32], 64, [32, 96]]}
    checkpoint, out = replace(trained.checkpoint, state=state), tmp_path / "export"
    export_checkpoint(trained.config, checkpoint, out, Wanted(("diffusers", "comfyui")))
    contract = read_contract(out / "tilt")
    assert contract is not None and contract.resolution == (96, 32)
    assert contract.sizes == ((96, 32), 64, (32, 96)) and list(contract.sized_sigmas) == ["64"]
    at = {size: load(trained.base, resolution=size).few_step_sigmas(4) for size in ((96, 32), 64)}
    assert contract.sigmas == tuple(at[96, 32].tolist())
    assert contract.sized_sigmas["64"] == tuple(at[64].tolist()) != contract.sigmas
    card = (out / "README.md").read_text()
    assert "guidance 1, 96x32, 64 or 32x96 pixels" in card and "height=96, width=32" in card
    levels = ", ".join(f"{level:.6g}" for level in contract.sized_sigmas["64"])
    assert f"levels of 96x32 pixels; those of others are 64 {levels}." in card
    asked = request(trained, resolution=None, few_step=out / "few_step", tilt_lora=out / "tilt")
    said_so = "but the student was trained for 96x32, 64 or 32x96"
    for how, note in (
        ({}, ()),
        ({"resolution": 64}, ()),
        ({"resolution": (64, 96)}, (f"warning: --size is 64x96, {said_so}",)),
        ({"buckets": (Bucket(64), Bucket((32, 96)))}, ()),
        ({"buckets": (Bucket(64), Bucket(32))}, (f"warning: --resolution is 32, {said_so}",)),
        (
            {"buckets": (Bucket(48), Bucket((64, 96)))},
            (f"warning: --size is 48 or 64x96, {said_so}",),
        ),
    ):
        settled = replace(asked, **how).settled
        assert settled.notes == note and settled.resolution == how.get("resolution", (96, 32))
    assert "sizes" not in trained.checkpoint.state  # as in runs over one size, whose own it is
    one = read_contract(trained.export / "tilt")
    assert one is not None and (one.sizes, one.sized_sigmas) == ((), {})


def test_a_run_its_export_and_the_command_line(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    more = [
        f"model.path={tiny_pipeline('sd3m')}", "model.family=sd3", "model.resolution=[32, 48]",
        "model.dtype=fp32", "model.max_sequence_length=24", f"data.prompts={tmp_path}/prompts.txt",
        "train.steps=1", "train.batch_size=2", "train.micro_batch_size=1", "adapters.rank=2",
        "log.samples_every=1", "log.samples=2", "run.device=cpu", f"run.out={tmp_path}/run",
        "data.cache=off", "model.autocast=null", "model.gradient_checkpointing=false",
    ]  # fmt: skip
    cfg = load_config("sd3m_cold_start", more)
    assert cfg.model.resolution == (32, 48)
    (tmp_path / "again.yaml").write_text(dump_config(cfg))
    assert load_config(str(tmp_path / "again.yaml")) == cfg
    run = run_training(cfg, Console(quiet=True))
    assert Image.open(run / "samples" / "step-000001.png").size == (8 * 48, 32)
    base = ["sample", "--model", str(tiny_pipeline("sd3m")), "--prompt", "a cat", "--device", "cpu"]
    base += ["--few-step", str(run / "export" / "few_step"), "--cache", "off"]
    for option, size in (([], (48, 32)), (["--size", "64x32"], (32, 64))):
        out = tmp_path / f"out{len(option)}"
        found = CliRunner().invoke(app, [*base, "--out", str(out), *option])
        assert found.exit_code == 0, found.output
        assert Image.open(out / "00000.png").size == size  # PIL's is width, height


def test_sizes_are_written_height_first() -> None:
    for text, size in (("832x1216", (832, 1216)), ("512x512", 512)):
        assert parse_size(text) == size
        assert plain(*both(size)) == size
    assert said((832, 1216)) == "832x1216" and said(512) == "512"
    assert latent_shape(6, 64, 2, (32, 48)) == (16, 4, 6)
    assert latent_shape(6, 64, 2, (48, 32)) == (16, 6, 4)
    assert latent_shape(16, 64, 2, (48, 32)) == (16, 8, 8)  # of other proportions: a square


@pytest.mark.parametrize(
    ("value", "said_so"),
    [
        ("[64, 60]", "model.resolution is 64x60, which is no multiple of 8"),
        ("[64]", "model.resolution is [64], but it should"),
        ("[64, 64, 64, 64]", "model.resolution is [64, 64, 64, 64], but it should"),
        ("[64, 8192]", "model.resolution is 8192, but it should be less than or equal to 4096"),
        ("wide", "model.resolution is 'wide', but it should be a valid integer"),
    ],
)
def test_what_is_no_resolution_says_one_sentence(value: str, said_so: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config("sd3m_cold_start", [f"model.resolution={value}", "data.prompts=p.txt"])
    assert str(caught.value).startswith(said_so)


def test_a_size_that_does_not_fit_the_family_says_one_sentence(tiny_pipeline: Tiny) -> None:
    said_so = "model.resolution=64x40 must be in both sides a positive multiple of 16"
    with pytest.raises(ValueError, match=said_so):
        load(tiny_pipeline("flux_dev"), resolution=(64, 40))


def test_a_size_on_the_command_line_says_one_sentence() -> None:
    base = ["sample", "--model", "packaged:pipeline", "--prompt", "a cat", "--out", "nowhere"]
    for option, words in (
        (["--size", "64"], "'64' is no size: write HEIGHTxWIDTH"),
        (["--size", "64x64", "--resolution", "64"], "give either --resolution SIDE or --size"),
        (["--size", "64x99999"], "a side is at most 4096"),
    ):
        found = CliRunner().invoke(app, [*base, *option])
        assert found.exit_code != 0 and words in str(found.exception)


def test_the_call_of_a_contract_has_both_sides(made: Callable[..., Student]) -> None:
    contract = read_contract(made("sd3m").export / "tilt")
    assert isinstance(contract, Contract)
    assert Contract.model_validate_json(contract.text()) == contract
