"""Malformed pipelines, LoRA folders, runs with checkpoints, and rewards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from malformed import (
    Case,
    Make,
    both,
    captions,
    cut,
    edit,
    header,
    lora,
    planted,
    remove,
    run,
    tensors,
    text,
)
from safetensors.torch import save_file

from tiltflow.core.disk import sha256
from tiltflow.core.paths import resolve_path

SAMPLE = "sample --device cpu --prompt 'a cat' --out images --model "
EVALUATE = "evaluate --device cpu --prompts prompts.txt --model model --teacher-steps 1 --reward "
TILT = (
    "train demo_tilt run.device=cpu data.prompts=prompts.txt data.eval_prompts=prompts.txt "
    "watch.rewards={} "
)
EXPORT = "export run --out lora"

INDEX = "model/model_index.json"
CONFIG = "model/transformer/config.json"
TRANSFORMER = "model/transformer/diffusion_pytorch_model.safetensors"
SHARDS = TRANSFORMER + ".index.json"
LORA = "lora/pytorch_lora_weights"
PART = "transformer__transformer_blocks__0__attn__to_q__lora_"
TEXT = "text_encoder__layers__0__q_proj__lora_"
OTHER = "transformer__blocks__9__to_q__lora_"
MIXTURE = """
stage: cold_start
model: {path: mixture}
data: {prompts: mixture}
run: {out: run}
train: {steps: 3, batch_size: 4, generator_lr: 1e-4, fake_score_lr: 1e-4}
"""


def other_autoencoder() -> None:
    """Whole in itself, with a quarter of the channels."""
    config = AutoencoderKL.load_config("model/vae")
    AutoencoderKL.from_config({**config, "latent_channels": 4}).save_pretrained("model/vae")


def broken(what: str, *makes: Make, line: str = SAMPLE + "model") -> Case:
    """A tiny SD3.5 pipeline in `model`, and what `makes` do to it."""
    return Case(what, line, both(*makes), "sd35m")


def huge(size: int, end: int, body: bytes = b"") -> Make:
    """Weights whose header declares size × size numbers in the bytes up to `end`."""
    entry = {"dtype": "F32", "shape": [size, size], "data_offsets": [0, end]}
    return header(TRANSFORMER, {"w": entry}, body=body)


def shard_index(content: object) -> Make:
    return both(remove(TRANSFORMER), text(SHARDS, json.dumps(content)))


def with_lora(what: str, *makes: Make) -> Case:
    return broken(what, *makes, line=SAMPLE + "model --few-step lora")


def nan_lora() -> None:
    """A LoRA folder whose one weight is no number."""
    Path("lora").mkdir()
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    save_file({name: torch.full((2, 64), float("nan"))}, LORA + ".safetensors")


def contract(content: str) -> Make:
    """A LoRA folder with a contract as one likes it."""

    def make() -> None:
        Path("lora").mkdir()
        save_file({"x": torch.zeros(2, 3)}, LORA + ".safetensors", {"tiltflow": content})

    return make


def checkpoint(what: str, change: Callable[[Path], object]) -> Case:
    """A run whose one checkpoint directory `change` gets."""
    return Case(what, EXPORT, run(change=change))


def manifest(what: str, **changes: object) -> Case:
    return checkpoint(what, lambda path: edit(str(path / "manifest.json"), **changes)())


def plant(path: Path) -> None:
    """A pickle under a tensor file's name, with the manifest's checksum put right."""
    planted(str(path / "ema.safetensors"))()
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["ema.safetensors"] = sha256(path / "ema.safetensors")
    (path / "manifest.json").write_text(json.dumps(content))


PIPELINES = [
    Case("no such directory", SAMPLE + "./nowhere"),
    Case("a typing error in a packaged name", SAMPLE + "packaged:pipelin"),
    Case("a way out of the package", SAMPLE + "packaged:../recipes"),
    Case("a model on the hub, without a connection", SAMPLE + "org/absent"),
    broken("no index", remove(INDEX)),
    broken("an index cut short", cut(INDEX)),
    broken("another class", edit(INDEX, _class_name="HunyuanVideoPipeline")),
    broken("a part of a class from elsewhere", edit(INDEX, vae=["os", "system"])),
    broken("a part of a class that there is not", edit(INDEX, vae=["diffusers", "Encoder"])),
    broken("a part with a path for a name", edit(INDEX, **{"../vae": ["diffusers", "VAE"]})),
    broken(
        "the wrong family",
        line="train demo_cold_start model.path=model model.family=flux",
    ),
    broken("files missing", remove("model/tokenizer"), remove("model/vae/config.json")),
    broken("weights cut short", cut(TRANSFORMER)),
    broken("weights of no length", text(TRANSFORMER, "")),
    broken("a header longer than the file", header(TRANSFORMER, {}, length=2**62)),
    broken("a tensor of 4 TB in 100 bytes", huge(2**20, 4 * 2**40)),
    broken("a tensor larger than its bytes", huge(2**30, 4, b"1234")),
    broken("a pickle called safetensors", planted(TRANSFORMER)),
    broken(
        "a pickle in place of safetensors",
        remove(TRANSFORMER),
        planted("model/transformer/diffusion_pytorch_model.bin"),
    ),
    broken("shards outside the part", shard_index({"weight_map": {"w": "../../x"}})),
    broken("shards that are pickles", shard_index({"weight_map": {"w": "x.bin"}})),
    broken("an index of shards without a map", shard_index({})),
    broken("a weight missing", tensors(TRANSFORMER, lambda table: table.pop("proj_out.weight"))),
    broken("a width that no weight has", edit(CONFIG, num_attention_heads=2**20)),
    broken("a depth that the weights do not have", edit(CONFIG, num_layers=10**12)),
    broken(
        "a text encoder's depth that its weights do not have",
        edit("model/text_encoder/config.json", num_hidden_layers=10**12),
    ),
    broken("another depth, of a like size", edit(CONFIG, num_layers=4)),
    broken("a configuration with a word for a number", edit(CONFIG, in_channels="many")),
    broken("a configuration cut short", cut(CONFIG)),
    broken("a broken tokenizer", cut("model/tokenizer/tokenizer.json")),
    broken("a broken scheduler", cut("model/scheduler/scheduler_config.json")),
    broken("parts of two models", other_autoencoder),
    broken("a resolution that does not fit", line=SAMPLE + "model --resolution 40"),
    broken("a second base for SD3", line=SAMPLE + "model --generator model"),
    broken(
        "a merged student for a teacher",
        edit(INDEX, scheduler=["tiltflow.scheduler", "CPSFlowMatchScheduler"]),
        line="train demo_cold_start run.device=cpu model.path=model",
    ),
    broken(
        "an index of shards that a later save left",
        text(SHARDS, json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}})),
    ),
    broken(
        "a text encoder whose weights lie elsewhere",
        edit("model/text_encoder/config.json", transformers_weights="../x.safetensors"),
    ),
]

LORAS = [
    with_lora("no such folder"),
    with_lora("a file in a folder's place", text("lora", "")),
    with_lora("an empty folder", lambda: Path("lora").mkdir()),
    with_lora("two files", text("lora/a.safetensors", ""), text("lora/b.safetensors", "")),
    with_lora("a pickle", planted(LORA + ".bin")),
    with_lora(
        "a torn file beside a pickle",
        lora(x=(2, 3)),
        cut(LORA + ".safetensors"),
        planted(LORA + ".bin"),
    ),
    with_lora(
        "another model's",
        lora(**{OTHER + "A__weight": (2, 8), OTHER + "B__weight": (8, 2)}),
    ),
    with_lora(
        "a smaller model's",
        lora(**{PART + "A__weight": (2, 8), PART + "B__weight": (8, 2)}),
    ),
    with_lora("no LoRA at all", lora(x=(2, 3))),
    with_lora(
        "a text encoder's too",
        lora(**{TEXT + "A__weight": (2, 8), PART + "A__weight": (2, 64)}),
    ),
    with_lora("a number that is not finite", nan_lora),
    with_lora("a contract that is no JSON", contract("{")),
    with_lora("a contract of no steps", contract('{"steps": 0}')),
    with_lora("a contract nested 100,000 deep", contract("[" * 100_000)),
    Case("stage 2 on a LoRA without metadata", TILT + "model.few_step=lora", lora(x=(2, 3))),
    broken("stage 2's without stage 1's", line=SAMPLE + "model --tilt-lora lora"),
]

RUNS = [
    Case(
        "an export over somebody's files",
        EXPORT,
        both(run(), text("lora/notes.txt", "mine")),
    ),
    Case("no run directory", "export nowhere --out lora"),
    Case("a run without a checkpoint", EXPORT, both(run(), remove("run/checkpoints"))),
    Case("a run of copies", EXPORT, run()),
    Case("a run of the mixture", EXPORT, both(run(), text("run/config.yaml", MIXTURE))),
    Case("a broken configuration", EXPORT, both(run(), text("run/config.yaml", "stage: cold\n"))),
    checkpoint("tensors cut short", lambda path: cut(str(path / "ema.safetensors"))()),
    checkpoint("tensors gone", lambda path: (path / "ema.safetensors").unlink()),
    checkpoint("no manifest", lambda path: (path / "manifest.json").unlink()),
    checkpoint(
        "a manifest nested too deeply",
        lambda path: (path / "manifest.json").write_text("[" * 100_000),
    ),
    checkpoint("a manifest cut short", lambda path: cut(str(path / "manifest.json"))()),
    checkpoint("a pickle with the right checksum", plant),
    manifest("another program's manifest", format="other"),
    manifest("a manifest that names a file elsewhere", files={"../../x": "", "state.json": ""}),
    manifest("a renamed checkpoint", step=4),
    Case(
        "going on with another model's run",
        "train demo_cold_start run.device=cpu data.prompts=prompts.txt data.eval_prompts=null "
        "watch.rewards={} run.out=run run.resume=true",
        run(),
    ),
    Case("stage 2 on a run of stage 2", TILT + "model.few_step=run", run("tilt")),
    Case("stage 2's adapters on a run of copies", TILT + "model.few_step=run", run()),
]

REWARDS = [
    broken("a typing error", line=EVALUATE + "clipscroe"),
    broken("a module that is not there", line=EVALUATE + "no_such:reward"),
    broken(
        "a module with a syntax error",
        text("typing_error.py", "def reward(images, prompts, metadata:\n    pass\n"),
        line=EVALUATE + "typing_error:reward",
    ),
    broken(
        "a module that raises on import",
        text("raising.py", "import os\nKEY = os.environ['NO_SUCH_KEY']\n"),
        line=EVALUATE + "raising:reward",
    ),
    broken(
        "a module that ends the program on import",
        text("ending.py", "import sys\nsys.exit()\n"),
        line=EVALUATE + "ending:reward",
    ),
    broken("a reward that raises", line=EVALUATE + "malformed:fails"),
    broken("prompts that a reward cannot score", line=EVALUATE + "shapes"),
    broken(
        "a quotation without its end",
        text("prompts.txt", 'the word "OPEN"\nthe words "BUY A 15" TV"\n'),
        line=EVALUATE + "ocr",
    ),
    broken("a name that is not in the module", line=EVALUATE + "malformed:flta"),
    broken("something that is no reward", line=EVALUATE + "malformed:CHANNELS"),
    broken("weights for a reward that has none", captions(), line=EVALUATE + "shapes@model"),
    broken("weights that are no CLIP", line=EVALUATE + "clipscore@model"),
    broken(
        "a CLIP that is a pickle",
        text("clip/config.json", '{"model_type": "clip"}'),
        planted("clip/pytorch_model.bin"),
        line=EVALUATE + "clipscore@clip",
    ),
    broken(
        "a CLIP cut short",
        lambda: shutil.copytree(resolve_path("packaged:clip"), "clip"),
        cut("clip/model.safetensors"),
        line=EVALUATE + "clipscore@clip",
    ),
    broken("scores of the wrong shape", line=EVALUATE + "malformed:flat"),
    broken("scores that are not finite", line=EVALUATE + "malformed:endless"),
    Case(
        "weights that are not there",
        TILT + "model.few_step=run 'rewards={clipscore: {weight: 1, path: ./nowhere}}'",
        run(),
    ),
]

CASES = {
    "Pipelines": PIPELINES,
    "LoRA folders": LORAS,
    "Runs and checkpoints": RUNS,
    "Rewards": REWARDS,
}
