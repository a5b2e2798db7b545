#!/usr/bin/env bash
# A text encoder that is saved in shards over an older single file loads as it was before, and a transformer does not.
#
# Versions: torch 2.13.0, transformers 5.23.0, diffusers 0.42.1.
# Behaviour: `save_pretrained` into a folder with an older save of the same model leaves files that it does not write
#   itself. One file before, shards and their index now: all are there. transformers' `from_pretrained` then opens the
#   single file, the older one, without a word; diffusers' follows the index, to the newer. Shards before, one file now:
#   both delete the old shards and leave the old index; transformers opens the new file, diffusers follows the index and
#   finds nothing (FileNotFoundError). So of a pipeline that is saved over another the transformer is the newer one and
#   the text encoder the older.
# One would have guessed: what was saved last is what loads, in both libraries that a pipeline is made of.
# Who is hurt: whoever fine-tunes a text encoder, or a vision-language model as a reward, beyond the size of one shard
#   (a base in bf16 fits, its fp32 copy does not), or gives `max_shard_size` for the first time, and saves into the folder
#   that was there. Training went well, evaluation is of the old model, and a checksum of the new shards is right.
# What helps: save into an empty folder; or delete model.safetensors before a save in shards, and the index before one in
#   a single file.
#
# Output seen (2026-11-29):
#   transformers, one file then shards: both are there, loads the older weights
#   transformers, shards then one file: loads the newer weights
#   diffusers, one file then shards: both are there, loads the newer weights
#   diffusers, shards then one file: FileNotFoundError
#   a pipeline over another: its transformer is the newer, its text encoder the older
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 diffusers==0.42.1 numpy pillow
cat > "$work/try.py" <<'PY'
import os
import tempfile
import warnings

warnings.filterwarnings("ignore")
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

torch.set_num_threads(1)
ONE, SHARDS = "1GB", "8KB"
WORDS = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 3, "projection_dim": 24, "max_position_embeddings": 9,
         "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
          "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 24,
          "axes_dims_rope": (4, 4, 4)}


def encoder(value):
    return filled(CLIPTextModelWithProjection(CLIPTextConfig(**WORDS)), value)


def transformer(value):
    return filled(FluxTransformer2DModel(**IMAGES), value)


def filled(model, value):
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def value_of(model):
    return next(model.parameters()).flatten()[0].item()


def saved_over(make, folder, before, now):
    make(1.0).save_pretrained(folder, max_shard_size=before)
    make(2.0).save_pretrained(folder, max_shard_size=now)
    names = os.listdir(folder)
    both = any(n.endswith(".index.json") for n in names) and any("-of-" in n for n in names)
    both = both and any(n.endswith(".safetensors") and "-of-" not in n for n in names)
    try:
        loaded = value_of(type(make(0.0)).from_pretrained(folder))
    except FileNotFoundError:
        return both, "FileNotFoundError"
    return both, {1.0: "older", 2.0: "newer"}[loaded]


seen = {}
for library, make in (("transformers", encoder), ("diffusers", transformer)):
    for order, sizes in (("one file then shards", (ONE, SHARDS)), ("shards then one file", (SHARDS, ONE))):
        with tempfile.TemporaryDirectory() as folder:
            both, loads = saved_over(make, folder, *sizes)
        seen[library, order] = both, loads
        there = "both are there, " if both else ""
        print(f"{library}, {order}: {there}" + (f"loads the {loads} weights" if loads in ("older", "newer") else loads))


def pipeline(value):
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, encoder(value), None, None, None, transformer(value))


with tempfile.TemporaryDirectory() as folder:
    pipeline(1.0).save_pretrained(folder, max_shard_size=ONE)
    pipeline(2.0).save_pretrained(folder, max_shard_size=SHARDS)
    parts = (
        value_of(FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")),
        value_of(CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder")),
    )
print("a pipeline over another: its transformer is the "
      + ", its text encoder the ".join({1.0: "older", 2.0: "newer"}[each] for each in parts))
assert seen == {
    ("transformers", "one file then shards"): (True, "older"),
    ("transformers", "shards then one file"): (False, "newer"),
    ("diffusers", "one file then shards"): (True, "newer"),
    ("diffusers", "shards then one file"): (False, "FileNotFoundError"),
}, seen
assert parts == (2.0, 1.0), parts
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/errors" || { cat "$work/errors"; exit 1; }
