#!/usr/bin/env bash
# fuse_lora(lora_scale=s) multiplies s into the adapter for good: fused a second time it counts s * s.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: `fuse_lora` scales the active adapters, merges them, and leaves them scaled. `unfuse_lora` gives the base
#   back and not the scale. The next `fuse_lora(lora_scale=0.5)` merges a quarter, the one after an eighth, and a call of
#   the unfused pipeline in between draws with a half. If `set_adapters` is called while fused, `unfuse_lora`
#   takes away another multiple than was merged, and the base itself is changed. Nothing is raised or warned.
# One would have guessed: `unfuse_lora` "reverses the effect of fuse_lora", as its docstring says, and `lora_scale` says
#   how strong this fusion is.
# Who is hurt: sweeps over a LoRA's strength that fuse for speed (fuse, draw, unfuse, next value). All but the first value
#   are weaker than their label: .25, .5, .75, 1 are drawn at .25, .125, .094, .094, so that "1" looks like no LoRA.
# What helps: fuse with `lora_scale=1` and set the strength by `set_adapters` before each fusion.
#
# Output seen (2026-11-28), the share of the LoRA that is in the fused weight:
#   asked for 0.25 0.50 0.75 1.00: fused 0.250 0.125 0.094 0.094
#   the unfused pipeline's adapter, after all of it: 0.094 of its strength
#   set_adapters before each fusion: fused 0.250 0.500 0.750 1.000
#   fused at 1, set_adapters to 0.5, unfused: the base keeps 0.500 of the LoRA
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging

logging.set_verbosity_error()

BLOCK = "transformer.transformer_blocks.0.attn.to_q"

def pipeline():
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    absent = ("vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=network, **dict.fromkeys(absent)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded():
    """The pipeline with a LoRA of rank 4 whose product is a matrix of ones, its layer, and the base's weight."""
    pipe = pipeline()
    ones = {f"{BLOCK}.lora_A.weight": torch.full((4, 32), 0.25), f"{BLOCK}.lora_B.weight": torch.ones(32, 4)}
    pipe.load_lora_weights(ones, adapter_name="style")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    return pipe, layer, layer.base_layer.weight.detach().clone()


def share(layer, base):
    return round(float((layer.base_layer.weight - base).mean()), 3)


def row(values):
    return " ".join(f"{v:.3f}" for v in values)


ASKED = [0.25, 0.5, 0.75, 1.0]
pipe, layer, base = loaded()
fused = []
for scale in ASKED:
    pipe.fuse_lora(lora_scale=scale)
    fused.append(share(layer, base))
    pipe.unfuse_lora()
    assert torch.allclose(layer.base_layer.weight, base, atol=1e-6)
print(f"asked for {' '.join(f'{s:.2f}' for s in ASKED)}: fused {row(fused)}")
assert fused == [0.25, 0.125, 0.094, 0.094]
print(f"the unfused pipeline's adapter, after all of it: {layer.scaling['style']:.3f} of its strength")
assert round(layer.scaling["style"], 3) == 0.094

pipe, layer, base = loaded()
fused = []
for scale in ASKED:
    pipe.set_adapters(["style"], [scale])
    pipe.fuse_lora()
    fused.append(share(layer, base))
    pipe.unfuse_lora()
print(f"set_adapters before each fusion: fused {row(fused)}")
assert fused == ASKED

pipe, layer, base = loaded()
pipe.fuse_lora()
pipe.set_adapters(["style"], [0.5])
pipe.unfuse_lora()
print(f"fused at 1, set_adapters to 0.5, unfused: the base keeps {share(layer, base):.3f} of the LoRA")
assert share(layer, base) == 0.5
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
