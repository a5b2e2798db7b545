"""The command line: whole path on a tiny pipeline, LoRAs in plain diffusers, bad input."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.cli import main as cli

SRC = Path(__file__).parents[1] / "src"
COMMANDS = (
    "demo", "train", "sample", "evaluate", "compare", "report", "export", "encode", "recipes",
    "doctor", "reward-server", "desk", "dial", "fit-reward", "study",
)  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["tiltflow", *map(str, arguments)])
    # a library's handler may hold the captured stderr of an earlier test, closed by now
    monkeypatch.setattr(logging, "raiseExceptions", False)
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def model(tiny_pipeline: Callable[[str], Path]) -> Path:
    return tiny_pipeline("sd35m")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\na bird\n")
    return path


def settings(model: Path, prompts: Path, out: Path) -> list[str]:
    values = {
        "model.path": model, "model.autocast": "null", "data.prompts": prompts,
        "data.eval_prompts": prompts, "train.steps": 2, "train.batch_size": 2, "run.out": out,
        "adapters.rank": 4, "watch.rewards": "{}", "log.samples_every": 1, "log.samples": 2,
        "model.max_sequence_length": 16, "run.device": "cpu", "train.generator_lr": 0.05,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def test_train_export_sample_evaluate_report(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cold, tilt, images = tmp_path / "cold", tmp_path / "tilt", tmp_path / "images"
    common = settings(model, prompts, cold)
    assert (
        call(monkeypatch, "train", "demo_cold_start", *common, "cold_start.generator_every=1") == 0
    )
    more = [*settings(model, prompts, tilt), f"model.few_step={cold}", "tilt.group_size=2"]
    more += ["rewards={'test_train:redness': 1.0}"]
    assert call(monkeypatch, "train", "demo_tilt", *more) == 0
    assert call(monkeypatch, "export", tilt, "--out", tmp_path / "lora") == 0
    loras = [tmp_path / "lora" / "few_step", tmp_path / "lora" / "tilt"]
    common = ["--model", model, "--few-step", loras[0], "--tilt-lora", loras[1]]
    common += ["--prompts", prompts, "--device", "cpu"]
    assert call(monkeypatch, "sample", *common, "--tilt", 0.5, "--out", images) == 0
    assert len(list(images.glob("*.png"))) == 3
    figures = tmp_path / "evaluation.json"
    arguments = [*common, "--reward", "test_train:redness", "--teacher-steps", 3]
    assert call(monkeypatch, "evaluate", *arguments, "--json", figures, "--keep-images") == 0
    systems = json.loads(figures.read_text())["systems"]
    assert list(systems) == ["teacher", "teacher_4_step", "ac_dmd", "rtdmd"]
    assert [s["nfe"] for s in systems.values()] == [6, 8, 4, 4]
    capsys.readouterr()
    assert call(monkeypatch, "compare", figures) == 0
    assert "rtdmd − ac_dmd" in capsys.readouterr().out
    assert call(monkeypatch, "compare", figures, "--systems", "rtdmd,teacher") == 0
    assert "rtdmd − teacher on test_train:redness" in capsys.readouterr().out
    kept = tmp_path / "evaluation.images"
    assert {len(list(folder.glob("*.png"))) for folder in kept.iterdir() if folder.is_dir()} == {3}
    assert len((tmp_path / "evaluation.scores.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "evaluation.parts").exists()
    assert call(monkeypatch, "report", cold, tilt, "--out", tmp_path / "page.html") == 0
    assert "<html" in (tmp_path / "page.html").read_text()


PLAIN = """
import sys, torch
from diffusers import StableDiffusion3Pipeline
model, few_step, tilt, out, *strengths = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32)
pipe.load_lora_weights(few_step, adapter_name="few_step")
pipe.load_lora_weights(tilt, adapter_name="tilt")
x = torch.load(out + "/x.pt", weights_only=True)
with torch.no_grad():
    embeds, _, pooled, _ = pipe.encode_prompt(
        "a cat", "a cat", "a cat", do_classifier_free_guidance=False, max_sequence_length=16
    )
    for strength in strengths:
        pipe.set_adapters(["few_step", "tilt"], [1.0, float(strength)])
        v = pipe.transformer(
            hidden_states=x, encoder_hidden_states=embeds, pooled_projections=pooled,
            timestep=torch.full((1,), 0.75) * 1000, return_dict=False,
        )[0]
        torch.save(v, f"{out}/{strength}.pt")
assert "tiltflow" not in sys.modules
"""


@pytest.mark.long
def test_an_exported_lora_loads_in_plain_diffusers(model: Path, tmp_path: Path) -> None:
    """In a process without tiltflow, strength kept (α / r is in B): difference 0 in fp32."""
    from diffusers import StableDiffusion3Pipeline

    from tiltflow.formats.writing import baked, save_adapter
    from tiltflow.models.families import load_backbone
    from tiltflow.models.lora_files import read_adapter
    from tiltflow.models.roles import AdapterSettings, adapter_roles
    from tiltflow.tasks.systems import load_students

    settings = AdapterSettings(4, 8.0, ["attn.to_q", "attn.to_out.0", "attn.add_k_proj"])
    roles = adapter_roles(load_backbone(model, device="cpu"), settings, seed=0)
    for name, seed in (("few_step", 1), ("tilt", 2)):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            k: 0.2 * torch.randn(v.shape, generator=generator)
            for k, v in roles.generator.state().items()
        }
        save_adapter(StableDiffusion3Pipeline, weights, settings, tmp_path / name)
        again, read = read_adapter(tmp_path / name)
        assert (again.rank, again.alpha, set(again.targets)) == (4, 4, set(settings.targets))
        expected, _ = baked(weights, settings)
        assert read.keys() == expected.keys() == weights.keys()
        assert all(torch.equal(read[k], expected[k]) for k in weights)
    x = torch.randn(
        1, *roles.teacher.backbone.latent_shape, generator=torch.Generator().manual_seed(3)
    )
    torch.save(x, tmp_path / "x.pt")
    strengths = (0.0, 0.5, 1.0)
    arguments = [model, tmp_path / "few_step", tmp_path / "tilt", tmp_path, *strengths]
    subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, arguments)], check=True, capture_output=True
    )
    for strength in strengths:
        loaded = load_students(
            load_backbone(model, device="cpu", max_sequence_length=16),
            tmp_path / "few_step", tmp_path / "tilt", strength,
        )  # fmt: skip
        cond = loaded.backbone.encode(["a cat"])
        with torch.no_grad():
            ours = loaded.students["rtdmd"](x, torch.full((1,), 0.75), cond)
            few_step = loaded.students["ac_dmd"](x, torch.full((1,), 0.75), cond)
        assert torch.equal(ours, few_step) == (strength == 0)
        theirs = torch.load(tmp_path / f"{strength}.pt", weights_only=True)
        assert torch.equal(ours, theirs), float((ours - theirs).abs().max())


def test_same_seed_same_image_whatever_the_batch(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (1, 3):
        arguments = ["--model", model, "--prompts", prompts, "--teacher-steps", 2, "--batch", batch]
        assert call(monkeypatch, "sample", *arguments, "--out", tmp_path / str(batch)) == 0
    for i in range(3):
        a, b = (np.asarray(Image.open(tmp_path / n / f"{i:05d}.png"), int) for n in ("1", "3"))
        assert np.abs(a - b).max() <= 1  # rounding of a larger matrix product


def test_autocast_changes_little_but_something(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, *options in (("plain",), ("mixed", "--autocast", "bf16")):
        arguments = ["--model", model, "--prompts", prompts, "--teacher-steps", 2, *options]
        assert call(monkeypatch, "sample", *arguments, "--out", tmp_path / name) == 0
    for i in range(3):
        a, b = (
            np.asarray(Image.open(tmp_path / n / f"{i:05d}.png"), int) for n in ("plain", "mixed")
        )
        assert 0 < np.abs(a - b).mean() < 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert f"Example: tiltflow {command}" in " ".join(capsys.readouterr().out.split())


BAD = {
    "train demo_cold_strat": "demo_cold_start",
    "train demo_cold_start trian.steps=3": "train.steps",
    "train demo_cold_start train.steps=ten": "train.steps",
    "train demo_cold_start model.path=./nowhere": "nowhere",
    "train demo_cold_start data.prompts=./none.txt": "none.txt",
    "train demo_tilt tilt.subset=4 model.few_step=x": "tilt.subset",
    "train demo_tilt tilt.group_size=7 model.few_step=x": "tilt.group_size",
    "train demo_cold_start model.resolution=30": "model.resolution",
    "sample --model ./nowhere --prompt x --out y": "nowhere",
    "sample --model {model} --out y": "--prompt",
    "sample --model {model} --prompt x --out y --tilt-lora ./z": "--few-step",
    "sample --model {model} --prompt x --out y --few-step ./z": "no LoRA",
    "sample --model {model} --prompt x --out y --dtype fp8": "fp32, bf16",
    "sample --model {model} --prompt x --out y --tilt 2": "--tilt",
    "evaluate --model {model} --prompt x": "--reward",
    "evaluate --model {model} --prompt x --suite shaeps": "shapes",
    "evaluate --model {model} --prompts shapes-heldout --count 2 --reward clipscroe": "clipscore",
    "evaluate --model {model} --prompt x --suite geneval": "'tag'",
    "compare ./nowhere.json": "nowhere.json",
    "reward-server clipscroe": "clipscore",
    "reward-server shapes --host 0.0.0.0": "TILTFLOW_REWARD_TOKEN",
    "train demo_tilt --steps 2": "train.steps=100",
    "report ./nowhere": "no run directory: there is nothing there",
    "export ./nowhere --out x": "no run directory",
    "recipes demo_tlit": "demo_tilt",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_sentence(
    line: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status = call(monkeypatch, *line.format(model=model).split())
    error = capsys.readouterr().err
    assert status not in (0, None)
    assert error.startswith("tiltflow: ") and BAD[line] in error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_the_module_runs_as_a_program() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-m", "tiltflow", "recipes"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "demo_cold_start" in done.stdout
