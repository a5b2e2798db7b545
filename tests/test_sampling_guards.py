"""`sample` and `evaluate` on weights, options and disks that are not in order."""

from __future__ import annotations

import errno
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from students import Student, request, sampled, student

from tiltflow.cli import main as cli
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation import chunks
from tiltflow.formats.writing import load_lora
from tiltflow.tasks import evaluate as command
from tiltflow.tasks import request as asking
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.demo import run_demo
from tiltflow.tasks.evaluate import check_target, evaluate_to, sample_images
from tiltflow.tasks.request import say_unused

Tiny = Callable[[str], Path]
LORA = "pytorch_lora_weights.safetensors"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    return student(tiny_pipeline, "sd3m", tmp_path_factory.mktemp("made"))


def changed(made: Student, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The few-step LoRA with other weights, without metadata."""
    out.mkdir()
    weights = load_file(made.export / "few_step" / LORA)
    change(weights)
    save_file(weights, out / LORA)
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_that_is_not_finite(made: Student, tmp_path: Path, value: float) -> None:
    key = min(load_file(made.export / "few_step" / LORA))
    folder = changed(made, tmp_path / "nan", lambda w: w[key].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=rf"has transformer\S+ with a value that is {value}"):
        sampled(request(made, few_step=folder))


@pytest.mark.parametrize("scale", ["latents", "images"])
def test_no_black_images(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str
) -> None:
    """What is not finite is an error with its prompt, wherever it comes from, and no file."""

    def broken(what: Any) -> Any:
        real = what

        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = real(*args, **kwargs).clone()
            out[-1] = float("nan")
            return out

        return call

    from tiltflow.tasks import systems

    name = "sample_few_step" if scale == "latents" else "_decode"
    monkeypatch.setattr(systems, name, broken(getattr(systems, name)))
    said = f"the {scale[:-1]} that rtdmd made of 'two dogs' is not finite"
    with pytest.raises(ValueError, match=said):
        sample_images(request(made), tmp_path / "images", QUIET)
    assert not list((tmp_path / "images").glob("*.png"))


def test_a_lora_with_text_encoder_weights(made: Student, tmp_path: Path) -> None:
    """In diffusers' names, and with kohya's for SD3."""
    for i, key in enumerate(
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
         "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight")
    ):  # fmt: skip
        folder = changed(made, tmp_path / str(i), lambda w, k=key: w.update({k: torch.ones(2, 2)}))
        with pytest.raises(ValueError, match=r"has weights of a text encoder \(text_encoder"):
            sampled(request(made, few_step=folder))


def test_a_wrong_lora_says_one_sentence(
    made: Student, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """diffusers logs the whole of torch's complaint before it raises it."""
    cut = changed(
        made, tmp_path / "cut",
        lambda w: w.update({k: v[..., :3].contiguous() for k, v in w.items() if "lora_A" in k}),
    )  # fmt: skip
    arguments = ["sample", "--model", str(made.model), "--few-step", str(cut), "--prompt", "a"]
    monkeypatch.setattr(sys, "argv", ["tiltflow", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if "torchvision" not in line]
    assert len(lines) == 1 and lines[0].startswith("tiltflow: the LoRA in "), said


def test_weights_and_loras_are_looked_at_before_anything_loads(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding and loading take minutes on a large model."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded before the LoRA was looked at")

    monkeypatch.setattr(asking, "load_backbone", never)
    keys = sorted(load_file(made.export / "few_step" / LORA))
    changes: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
        "nan": (lambda w: w[keys[0]].view(-1)[:1].fill_(float("nan")), "a value that is nan"),
        "encoder": (lambda w: w.update({"text_encoder.x": torch.ones(1)}), "of a text encoder"),
        "shape": (lambda w: w.update({keys[0]: torch.ones(2, 5)}), "does not fit this model"),
        "other": (
            lambda w: [w.update({k.replace("s.0.", "s.70."): w.pop(k)}) for k in keys],
            "is one of another model",
        ),
    }  # fmt: skip
    for name, (change, said) in changes.items():
        folder = changed(made, tmp_path / name, change)
        with pytest.raises(ValueError, match=said):
            sample_images(request(made, few_step=folder), tmp_path / "images", QUIET)
        with pytest.raises(ValueError, match=said):
            sample_images(request(made, tilt_lora=folder), tmp_path / "images", QUIET)
    model = shutil.copytree(made.model, tmp_path / "model")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"extra": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="holds extra, which a SD3Transformer2DModel does not use"):
        sample_images(request(made, model=str(model)), tmp_path / "images", QUIET)
    assert not (tmp_path / "images").exists()
    monkeypatch.undo()
    assert torch.isfinite(sampled(request(made))).all()


def test_loading_leaves_the_librarys_verbosity(made: Student) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    pipe: Any = DiffusionPipeline.from_pretrained(made.base)
    load_lora(pipe, made.export / "few_step", "a")
    assert diffusers_logging.get_verbosity() == before != logging.CRITICAL


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "1000000000"], "1000"),
        (["--teacher-steps", "1000000000"], "1000"),
        (["--batch", "1000000000"], "65536"),
        (["--resolution", "1000000000"], "4096"),
        (["--max-sequence-length", "1000000000"], "4096"),
        (["--seed", str(2**64)], str(2**63 - 1)),
        (["--prompt", "caf\udce9"], "--prompt holds a byte that is not UTF-8"),
        (["--student-guidance", "inf"], "--student-guidance is inf"),
    ],
)
def test_bounds_are_named(
    made: Student, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], said: str
) -> None:
    line = ["sample", "--model", str(made.model), "--out", str(tmp_path / "o"), "--prompt", "a cat"]
    monkeypatch.setattr(sys, "argv", ["tiltflow", *line, *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_places_are_looked_at_first(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded before the place was looked at")

    monkeypatch.setattr(command, "prepare", never)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="is a folder, but --json names the file"):
        evaluate_to(tmp_path / "folder", request(made), QUIET)
    with pytest.raises(ValueError, match="cannot be written: .*file is no folder"):
        evaluate_to(tmp_path / "file" / "e.json", request(made), QUIET)
    with pytest.raises(ValueError, match="is a file, but the images go into a folder"):
        sample_images(request(made), tmp_path / "file", QUIET)


def scored(made: Student) -> Any:
    prompts = [Prompt("a red circle on white"), Prompt("a blue square on white")]
    return request(made, rewards={"shapes": None}, teacher_steps=1, prompts=prompts)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_by_its_file(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scored(made)
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(Image.Image, "save", full)
        sample_images(request(made), tmp_path / "images", QUIET)
    assert caught.value.filename == str(tmp_path / "images" / "00000.png")
    for place, name in ((chunks, "save_tensors"), (command, "write_evaluation")):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(place, name, full)
            evaluate_to(tmp_path / "e.json", asked, QUIET)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value.filename).startswith(str(tmp_path / "e."))


def test_images_of_an_earlier_evaluation_do_not_stay_beside_new_ones(
    made: Student, tmp_path: Path
) -> None:
    asked = scored(made)
    evaluate_to(tmp_path / "e.json", asked, QUIET, keep_images=True)
    images = tmp_path / "e.images"
    first = sorted(p.relative_to(images) for p in images.rglob("*.png"))
    (images / "teacher" / "00007.png").touch()
    (images / "gone").mkdir()
    evaluate_to(tmp_path / "e.json", asked, QUIET, keep_images=True)
    assert sorted(p.relative_to(images) for p in images.rglob("*")) == sorted(
        {*first, *(p.parent for p in first), Path("prompts.txt")}
    )
    assert not (tmp_path / "e.parts").exists()


def test_what_is_no_evaluation_is_not_written_over(tmp_path: Path) -> None:
    for name, text in (("a.json", "{}"), ("b.yaml", "stage: tilt"), ("c.json", "[" * 100_000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is there and is no evaluation"):
            check_target(tmp_path / name)
        assert (tmp_path / name).read_text() == text
    (tmp_path / "d.images").mkdir()
    with pytest.raises(ValueError, match=r"d\.images, .* holds something else"):
        check_target(tmp_path / "d.json")
    (tmp_path / "d.images" / "prompts.txt").touch()
    (tmp_path / "d.json").touch()  # as one that a script has made room for
    check_target(tmp_path / "d.json")


def test_a_fresh_demo_deletes_no_more_than_a_demo(tmp_path: Path) -> None:
    (tmp_path / "cold_start").mkdir()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="it holds 'thesis.tex', which is none of a demo's"):
        run_demo(tmp_path, fast=True, fresh=True, console=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cold_start", "thesis.tex"]


def test_the_first_images_are_kept_by_default(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "KEPT_IMAGES", 1)
    evaluate_to(tmp_path / "e.json", scored(made), QUIET)
    images = tmp_path / "e.images"
    systems = sorted(p.name for p in images.iterdir() if p.is_dir())
    assert systems == ["ac_dmd", "rtdmd", "teacher", "teacher_4_step"]
    assert {p.name for p in images.rglob("*.png")} == {"00000.png"}
    assert len((images / "prompts.txt").read_text().splitlines()) == 1


def test_a_vae_that_scales_by_nothing(made: Student, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    file = model / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.0}))
    with pytest.raises(ValueError, match="scaling_factor|not finite"):
        sample_images(request(made, model=str(model)), tmp_path / "images", QUIET)
    assert not list((tmp_path / "images").glob("*.png"))


def test_images_of_an_earlier_call_are_said_to_be(made: Student, tmp_path: Path) -> None:
    said, out = io.StringIO(), tmp_path / "images"
    out.mkdir()
    mine = ["cat.png", "2024.png", "00009.txt"]
    for name in ("00000.png", *mine):
        (out / name).touch()
    sample_images(request(made), out, Console(file=said))
    assert "earlier" not in said.getvalue()
    for name in ("00002.png", "00011.png"):
        (out / name).touch()
    sample_images(request(made), out, Console(file=said, width=500))
    assert f"{out / '00002.png'} and 1 more in this folder are not of these" in said.getvalue()
    assert {path.name for path in out.iterdir()} == {
        "00000.png", "00001.png", "00002.png", "00011.png", *mine
    }  # fmt: skip


def test_an_option_of_what_is_not_sampled_is_said(made: Student) -> None:
    """The students' steps where the teacher is sampled, and the teacher's guidance where not."""
    teacher: dict[str, Any] = {"few_step": None, "tilt_lora": None}
    for how, student_is, line in (
        (teacher | {"steps": 8, "eta": 1.0}, False, "warning: --steps and --eta are of students"),
        (teacher | {"student_guidance": 2.0}, False, "--student-guidance is of students, and the"),
        ({"guidance": 5.0}, True, "warning: --guidance is the teacher's, and a student is"),
        (
            {"prompts": [Prompt("a cat", {}, "a dog")]},
            True,
            "negative prompts are the teacher",
        ),
        ({"steps": 8}, True, ""),
        (teacher | {"guidance": 5.0}, False, ""),
    ):
        said = Lines()
        say_unused(request(made, **how), student_is, said)
        assert len(said.lines) == bool(line) and line in "".join(said.lines)
    with pytest.raises(ValueError, match=r"--tilt is 0\.5, but there is no --tilt-lora to have it"):
        request(made, tilt=0.5, tilt_lora=None).settled  # noqa: B018


class Lines(Callbacks):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        self.lines.append(text)
