"""Malformed numbers, weights and tokenizers of pipelines: what is refused before anything loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from malformed import Case, Make, both, edit, header, remove, tensors, text
from safetensors.torch import load_file, save_file

from tiltflow.core.paths import resolve_path

SAMPLE = "sample --device cpu --prompt 'a cat' --out images --model model"

INDEX = "model/model_index.json"
CONFIG = "model/transformer/config.json"
VAE = "model/vae/config.json"
CLIP = "model/text_encoder/config.json"
T5 = "model/text_encoder_3/config.json"
SCHEDULER = "model/scheduler/scheduler_config.json"
TOKENIZER = "model/tokenizer/tokenizer_config.json"
TRANSFORMER = "model/transformer/diffusion_pytorch_model.safetensors"
PROJECTION = "proj_out.weight"
DEEP = "[" * 100_000 + "]" * 100_000


def sd3(what: str, *makes: Make, line: str = SAMPLE) -> Case:
    """A tiny SD3.5 pipeline in `model`, and what `makes` do to it."""
    return Case(what, line, both(*makes), "sd35m")


def klein(what: str, *makes: Make) -> Case:
    return Case(what, SAMPLE, both(*makes), "klein")


def sana(what: str, *makes: Make) -> Case:
    return Case(what, SAMPLE, both(*makes), "sana")


def of(name: str, what: str, *makes: Make, line: str = SAMPLE) -> Case:
    """Another family's tiny pipeline."""
    return Case(what, line, both(*makes), name)


def added(part: str, name: str, value: torch.Tensor, stem: str = "diffusion_pytorch_model") -> Make:
    return tensors(f"model/{part}/{stem}.safetensors", lambda table: table.update({name: value}))


def put(name: str, value: float) -> Make:
    """One number of a transformer's weight set."""

    def change(table: dict[str, torch.Tensor]) -> None:
        table[name].view(-1)[0] = value

    return tensors(TRANSFORMER, change)


def retyped(dtype: torch.dtype, scale: str = "") -> Make:
    """A weight in another type, with a scale of its own beside it."""

    def change(table: dict[str, torch.Tensor]) -> None:
        table[PROJECTION] = table[PROJECTION].to(dtype)
        if scale:
            table[scale] = torch.ones(1)

    return tensors(TRANSFORMER, change)


def shards(index: Callable[[dict[str, str]], Any], twice: bool = False) -> Make:
    """The transformer in two files, with an index that `index` gets."""

    def make() -> None:
        table = load_file(TRANSFORMER)
        Path(TRANSFORMER).unlink()
        names = sorted(table)
        first, second = names[:50], names[49 if twice else 50 :]
        listed = {}
        for file, chosen in (("a.safetensors", first), ("b.safetensors", second)):
            save_file({n: table[n] for n in chosen}, f"model/transformer/{file}", {"format": "pt"})
            listed |= dict.fromkeys(chosen, file)
        index(listed)
        Path(TRANSFORMER + ".index.json").write_text(
            json.dumps({"weight_map": listed, "metadata": {}})
        )

    return make


def raw(name: str, key: str, value: str) -> Make:
    """A key of a JSON file set to what `json.dumps` does not write."""

    def make() -> None:
        content = json.loads(Path(name).read_text()) | {key: "HERE"}
        Path(name).write_text(json.dumps(content).replace('"HERE"', value))

    return make


def vocabulary() -> None:
    """A tokenizer larger than any: a sparse file, which takes no room."""
    with open("model/tokenizer/vocab.json", "wb") as file:
        file.truncate(2**31)


NUMBERS = [
    sd3("an index nested 100,000 deep", text(INDEX, DEEP)),
    sd3("a configuration nested 100,000 deep", text(CONFIG, DEEP)),
    sd3("a tokenizer nested 100,000 deep", text("model/tokenizer/tokenizer.json", DEEP)),
    sd3("a list of shards nested 100,000 deep", remove(TRANSFORMER),
        text(TRANSFORMER + ".index.json", DEEP)),
    sd3("a vocabulary of 2 GB", vocabulary),
    sd3("a number of 5,000 digits", raw(CONFIG, "num_layers", "9" * 5000)),
    sd3("a number of 400 digits", raw(CONFIG, "num_layers", "9" * 400)),
    sd3("a configuration that is a list", text(CONFIG, "[]")),
    sd3("a configuration that is not UTF-8", text(CONFIG, b"\xff\xfe{}")),
    sd3("patches of no size", edit(CONFIG, patch_size=0)),
    sd3("no patch size", edit(CONFIG, patch_size=None)),
    sd3("patches of half a cell", edit(CONFIG, patch_size=1.5)),
    sd3("a million layers", edit(CONFIG, num_layers=10**6)),
    sd3("a negative number of layers", edit(CONFIG, num_layers=-3)),
    sd3("true for a number", edit(CONFIG, num_layers=True)),
    sd3("a billion channels", edit(CONFIG, in_channels=10**9)),
    sd3("samples of a billion cells", edit(CONFIG, sample_size=10**9)),
    sd3("samples of no cells", edit(CONFIG, sample_size=0)),
    sd3("positions for a million cells", edit(CONFIG, pos_embed_max_size=10**6)),
    sd3("positions that the weights do not have", edit(CONFIG, pos_embed_max_size=16)),
    sd3("heads in a list", edit(CONFIG, num_attention_heads=[4])),
    sd3("a billion dual layers", edit(CONFIG, dual_attention_layers=[10**9])),
    sd3("other dual layers than the weights", edit(CONFIG, dual_attention_layers=[0])),
    sd3("a norm that there is not", edit(CONFIG, qk_norm="no_norm")),
    sd3("a scale of no number", edit(VAE, scaling_factor="x")),
    sd3("a scale of 0", edit(VAE, scaling_factor=0)),
    sd3("a scale that is NaN", raw(VAE, "scaling_factor", "NaN")),
    sd3("a scale that is infinite", raw(VAE, "scaling_factor", "Infinity")),
    sd3("a scale below 0", edit(VAE, scaling_factor=-1.5)),
    sd3("no scale", edit(VAE, scaling_factor=None)),
    sd3("a shift that is infinite", raw(VAE, "shift_factor", "-Infinity")),
    sd3("a block of no channels", edit(VAE, block_out_channels=[8, 8, 16, 0])),
    sd3("no blocks", edit(VAE, block_out_channels=[])),
    sd3("blocks in a word", edit(VAE, block_out_channels="8")),
    sd3("groups that do not divide", edit(VAE, norm_num_groups=5)),
    sd3("a million layers a block", edit(VAE, layers_per_block=10**6)),
    sd3("other blocks than the weights", edit(VAE, down_block_types=["DownEncoderBlock2D"])),
    sd3("a text encoder of no heads", edit(CLIP, num_attention_heads=0)),
    sd3("a billion positions of a text encoder", edit(CLIP, max_position_embeddings=10**9)),
    sd3("a billion words", edit(T5, vocab_size=10**9)),
    sd3("a T5 with a billion buckets", edit(T5, relative_attention_num_buckets=10**9)),
    sd3("a rounding guard that is a word", edit(T5, layer_norm_epsilon="small")),
    sd3("a tokenizer of length x", edit(TOKENIZER, model_max_length="x")),
    sd3("a tokenizer without a length", edit(TOKENIZER, model_max_length=...)),
    sd3("a tokenizer longer than its encoder", edit(TOKENIZER, model_max_length=77)),
    sd3("a tokenizer of no length", edit(TOKENIZER, model_max_length=0)),
    sd3("a T5 tokenizer of length x",
        edit("model/tokenizer_3/tokenizer_config.json", model_max_length="x")),
    sd3("a shift of 0", edit(SCHEDULER, shift=0)),
    sd3("a shift that is NaN", raw(SCHEDULER, "shift", "NaN")),
    sd3("a shift that is a word", edit(SCHEDULER, shift="x")),
    sd3("a billion training levels", edit(SCHEDULER, num_train_timesteps=10**9)),
    sd3("a last level of 1", edit(SCHEDULER, shift_terminal=1.0)),
    sd3("a yes for true", edit(SCHEDULER, use_dynamic_shifting="yes")),
    sd3("a scheduler that is null", edit(INDEX, scheduler=None)),
    sd3("a way of spacing that is null", edit(SCHEDULER, use_beta_sigmas=None)),
    sd3("a kind of shift that there is not", edit(SCHEDULER, time_shift_type="cubic")),
    sd3("a side file with a word", text("model/tiltflow.json", '{"guidance": "high"}')),
    sd3("a side file with a billion tokens",
        text("model/tiltflow.json", '{"max_sequence_length": 1000000000}')),
    klein("a guard of the batch norm that is negative", edit(VAE, batch_norm_eps=-1)),
    sana("a solver of another kind than flow matching", edit(SCHEDULER, use_flow_sigmas=False)),
    sana("a billion stages", edit(VAE, encoder_layers_per_block=[10**9] * 4)),
    klein("positions in a word", edit(CONFIG, axes_dims_rope="4444")),
    klein("positions that do not fill a head", edit(CONFIG, axes_dims_rope=[4, 4, 4])),
]  # fmt: skip

WEIGHTS = [
    sd3("a weight too many in the transformer", added("transformer", "extra", torch.ones(2))),
    sd3("a weight too many in the autoencoder", added("vae", "extra", torch.ones(2))),
    sd3("a weight too many in a text encoder",
        added("text_encoder", "text_model.extra", torch.ones(2), "model")),
    sd3("a weight too few in a text encoder", tensors(
        "model/text_encoder_3/model.safetensors", lambda table: table.pop("shared.weight"))),
    sd3("8 bits with scales", retyped(torch.float8_e4m3fn, "proj_out.weight_scale")),
    sd3("8 bits with other scales", retyped(torch.float8_e4m3fn, "proj_out.scale_weight")),
    sd3("8 bits without scales", retyped(torch.float8_e4m3fn)),
    sd3("integers for weights", retyped(torch.int8)),
    sd3("a weight that is NaN", put(PROJECTION, float("nan"))),
    sd3("a weight that is infinite", put(PROJECTION, float("-inf"))),
    sd3("a weight in two shards", shards(lambda listed: None, twice=True)),
    sd3("an index that names a weight too many", shards(lambda listed: listed.update(w=
        "a.safetensors"))),
    sd3("an index that leaves a weight out", shards(lambda listed: listed.pop(PROJECTION))),
    sd3("an index that has a weight elsewhere", shards(lambda listed: listed.update(
        {PROJECTION: "b.safetensors"}))),
    sd3("shards that are numbers", remove(TRANSFORMER),
        text(TRANSFORMER + ".index.json", '{"metadata": {}, "weight_map": {"w": 1}}')),
    sd3("a header that is a list", header(TRANSFORMER, [])),
    sd3("another autoencoder's class", edit(INDEX, vae=["diffusers", "AutoencoderTiny"])),
    sd3("another transformer's class", edit(CONFIG, _class_name="FluxTransformer2DModel")),
    sd3("another text encoder's class",
        edit(INDEX, text_encoder=["transformers", "CLIPTextModel"])),
    sd3("a folder for a configuration", remove(CONFIG), lambda: Path(CONFIG).mkdir()),
    klein("a negative variance", tensors(
        "model/vae/diffusion_pytorch_model.safetensors",
        lambda table: table.update({"bn.running_var": -table["bn.running_var"]}))),
]  # fmt: skip

TRAIN = (
    "train demo_cold_start run.device=cpu data.prompts=prompts.txt data.eval_prompts=null "
    "watch.rewards={} model.path=model "
)
TILT = TRAIN.replace("demo_cold_start", "demo_tilt") + "model.few_step=lora "
NAME = "transformer.transformer_blocks.0.attn.to_q"


def lora(*names: str, value: float = 1.0, **facts: Any) -> Make:
    """A LoRA folder with such weights and, if given, metadata."""

    def make() -> None:
        Path("lora").mkdir()
        table = {name: torch.full((2, 2), value) for name in names}
        saved = {f"transformer.{key}": value for key, value in facts.items()}
        metadata = {"lora_adapter_metadata": json.dumps(saved)} if facts else {}
        save_file(table, "lora/pytorch_lora_weights.safetensors", metadata)

    return make


BOTH = (f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight")
PLAIN: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}

EVALUATE = "evaluate --device cpu --prompts prompts.txt --model model --teacher-steps 1 --reward "


def clip(name: str) -> Make:
    """The packaged CLIP in `clip`, with a weight too many."""
    return both(
        lambda: shutil.copytree(resolve_path("packaged:clip"), "clip"),
        tensors("clip/model.safetensors", lambda table: table.update({name: torch.ones(1)})),
    )


FITS = [
    sd3("a reward's weight too many", clip("text_model.q_proj.weight_scale"),
        line=EVALUATE + "clipscore@clip"),
    sd3("more text tokens than the pipeline takes", line=TRAIN + "model.max_sequence_length=513"),
    sd3("a billion text tokens", line=TRAIN + "model.max_sequence_length=1000000000"),
    sd3("a student\'s guidance that takes two passes", line=TRAIN + "model.student_guidance=4"),
    sd3("a resolution beyond the positions", line=TRAIN + "model.resolution=1024"),
    sd3("targets that are no expression", line=TRAIN + """'adapters.targets="*("'"""),
    sd3("targets that no module has", line=TRAIN + "adapters.targets=[nothing]"),
    sd3("targets of which one is misspelt", line=TRAIN + "adapters.targets=[attn.to_q,attn.to_kk]"),
    sd3("a teacher\'s guidance below 1", line=TRAIN + "model.guidance=0"),
    sd3("figures of a guidance below 1", line=EVALUATE + "clipscore --guidance 0"),
    sd3("a last level and one step", edit(SCHEDULER, shift_terminal=0.1),
        line=TRAIN + "sampler.steps=1"),
    sd3("levels that rise", edit(SCHEDULER, invert_sigmas=True), line=TRAIN),
    sd3("a line of shifts without an end",
        edit(SCHEDULER, use_dynamic_shifting=True, max_shift=None), line=TRAIN),
    sd3("an unknown weight, by train", added("vae", "extra", torch.ones(2)), line=TRAIN),
    sd3("sampling with a text encoder\'s LoRA",
        lora(*BOTH, "text_encoder.layers.0.lora_A.weight"), line=SAMPLE + " --few-step lora"),
    sd3("sampling with a LoRA that is NaN", lora(*BOTH, value=float("nan"), **PLAIN),
        line=SAMPLE + " --few-step lora"),
    sd3("stage 2 on a text encoder\'s LoRA",
        lora(*BOTH, "text_encoder.layers.0.lora_A.weight", **PLAIN), line=TILT),
    sd3("stage 2 on a smaller model\'s LoRA", lora(*BOTH, **PLAIN), line=TILT),
    sd3("stage 2 on a LoRA without α", lora(*BOTH), line=TILT),
    sd3("stage 2 on a LoRA that is infinite", lora(*BOTH, value=float("inf"), **PLAIN), line=TILT),
    sd3("stage 2 on a DoRA", lora(*BOTH, **PLAIN, use_dora=True), line=TILT),
    sd3("stage 2 on a LoRA of other ranks than it says",
        lora(*BOTH, **PLAIN | {"rank_pattern": {"to_q": 8}}), line=TILT),
    sd3("stage 2 on kohya\'s format", lora("lora_unet_x.lora_up.weight"), line=TILT),
    sd3("stage 2 on half a LoRA", lora(BOTH[0], **PLAIN), line=TILT),
]  # fmt: skip

NEWER = [
    of("krea2", "Krea 2 with a million blocks for text",
        edit(CONFIG, num_layerwise_text_blocks=10**6)),
    of("krea2", "Krea 2 with the states of layers that there are not",
        edit(INDEX, text_encoder_select_layers=[0, 1, 9])),
    of("krea2", "Krea 2 with a layer in place of a list of them",
        edit(INDEX, text_encoder_select_layers=-1)),
    of("krea2", "Krea 2 with a list for the size of its patches", edit(INDEX, patch_size=[1])),
    of("qwen_image", "Qwen-Image with a guidance input", edit(CONFIG, guidance_embeds=True)),
    of("qwen_image", "Qwen-Image with a deviation of 0", edit(VAE, latents_std=[0.0] * 8)),
    of("qwen_image_21", "Qwen-Image-2.1 with a billion inputs",
        edit(CONFIG, context_in_dim=10**9)),
    of("qwen_image_21", "Qwen-Image-2.1 without a template",
        remove("model/processor/chat_template.jinja")),
    of("qwen_image_21", "Qwen-Image-2.1 that is distilled",
        edit(INDEX, sample_sigmas=[1.0, 0.5])),
    of("qwen_image_21", "Qwen-Image-2.1 that makes no opacity", edit(VAE, out_channels=3)),
    of("z_image", "Z-Image with pictures beyond the positions",
        edit(CONFIG, axes_lens=[64, 8, 8]), line=SAMPLE + " --size 64x256"),
    of("z_image", "Z-Image with prompts beyond the positions",
        edit(CONFIG, axes_lens=[64, 8, 8]), line=SAMPLE + " --size 64x64"),
    of("chroma", "Chroma with a million layers for modulation",
        edit(CONFIG, approximator_layers=10**6)),
    of("flux2_dev", "FLUX.2-dev without a template",
        remove("model/tokenizer/chat_template.jinja")),
]  # fmt: skip

CASES = {
    "A pipeline's numbers": NUMBERS,
    "A pipeline's weights": WEIGHTS,
    "What goes on a pipeline": FITS,
    "The newer families": NEWER,
}

NAMES = ("krea2", "qwen_image", "qwen_image_21", "chroma", "flux2_dev", "z_image")
"""The pipelines of `NEWER`."""
