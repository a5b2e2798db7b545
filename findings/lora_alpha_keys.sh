#!/usr/bin/env bash
# The same LoRA file with `.alpha` tensors: FLUX.1's pipeline honours them, SD3's and FLUX.2-klein's refuse the file.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: keys `transformer.BLOCK.lora_A.weight`, `.lora_B.weight` and `BLOCK.alpha` (rank 4, alpha 8).
#   FluxPipeline.load_lora_weights reads alpha / rank = 2. StableDiffusion3Pipeline and Flux2KleinPipeline raise that the
#   checkpoint is no LoRA, since a key has no "lora" in its name. Without the `.alpha` keys all three take scale 1.
# One would have guessed: one library reads one layout in one way; at worst an unknown key is skipped.
# Who is hurt: whoever writes one file for several programs. Other readers take the scale from `.alpha` (and 1 where
#   there is none), so a file that keeps its alpha for them cannot be loaded by diffusers for two families of three.
# What helps: multiply alpha / rank into lora_B and leave `.alpha` out: every reader then has the same product.
#
# Output seen (2026-11-28):
#   FLUX.1        without .alpha: scale 1    with .alpha: scale 2
#   SD3           without .alpha: scale 1    with .alpha: ValueError
#   FLUX.2-klein  without .alpha: scale 1    with .alpha: ValueError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

SHARED = dict(num_layers=1, joint_attention_dim=32)
NO_TEXT = dict(vae=None, text_encoder=None, tokenizer=None)
NO_SECOND = dict(text_encoder_2=None, tokenizer_2=None)
sd3 = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=4,
    caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8, **SHARED,
)
flux = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **SHARED,
)
klein = Flux2Transformer2DModel(
    in_channels=4, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    axes_dims_rope=[4, 4, 4, 4], **SHARED,
)
pipelines = {
    "FLUX.1": FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=flux, **NO_TEXT, **NO_SECOND),
    "SD3": StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=sd3, text_encoder_3=None, tokenizer_3=None,
        **NO_TEXT, **NO_SECOND,
    ),
    "FLUX.2-klein": Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=klein, **NO_TEXT
    ),
}
BLOCK = "transformer.transformer_blocks.0.attn.to_q"
LORA = {f"{BLOCK}.lora_A.weight": torch.ones(4, 32), f"{BLOCK}.lora_B.weight": torch.ones(32, 4)}


def scale(pipeline, name, weights):
    try:
        pipeline.load_lora_weights(dict(weights), adapter_name=name)
    except ValueError:
        return "ValueError"
    return f"scale {float(pipeline.transformer.transformer_blocks[0].attn.to_q.scaling[name]):g}"


found = {}
for name, pipeline in pipelines.items():
    plain = scale(pipeline, "plain", LORA)
    alpha = scale(pipeline, "alpha", {**LORA, f"{BLOCK}.alpha": torch.tensor(8.0)})
    print(f"{name:13} without .alpha: {plain}    with .alpha: {alpha}")
    found[name] = (plain, alpha)
assert found["FLUX.1"] == ("scale 1", "scale 2")
assert found["SD3"] == found["FLUX.2-klein"] == ("scale 1", "ValueError")
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
