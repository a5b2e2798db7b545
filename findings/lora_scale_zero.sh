#!/usr/bin/env bash
# One call with a LoRA scale of 0 sets every active adapter to strength 1 for the calls after it.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: `joint_attention_kwargs={"scale": s}` (in other pipelines `attention_kwargs`) multiplies the adapters' strengths
#   for a forward pass and divides by s afterwards. For s = 0 it cannot divide, and sets each active adapter to 1
#   instead of what `set_adapters` gave it. The docstring calls that "the correct value". The call itself is right.
# One would have guessed: an argument of one call holds for that call, as it does with any other s.
# Who is hurt: comparisons with and without a LoRA, and sweeps of a strength that begin at 0. Everything after the
#   picture at 0 is drawn with all adapters at full strength: with ["few_step", "style"] at [1.0, 0.3] the style is at 1.
# What helps: `disable_lora()` and `enable_lora()`, or `set_adapters` before every call.
#
# Output seen (2026-11-28), strengths of two adapters set to 1.0 and 0.3, and how far the same call is from its first picture:
#   after a call at scale 0.5: 1.0 and 0.3, off by 0
#   after a call at scale 0.0: 1.0 and 1.0, off by 0.017
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


def lora(seed):
    draw = torch.Generator().manual_seed(seed)
    block = "transformer.transformer_blocks.0.attn.to_q"
    return {
        f"{block}.lora_A.weight": torch.randn(4, 32, generator=draw),
        f"{block}.lora_B.weight": torch.randn(32, 4, generator=draw),
    }


pipe = pipeline()
pipe.load_lora_weights(lora(1), adapter_name="few_step")
pipe.load_lora_weights(lora(2), adapter_name="style")
pipe.set_adapters(["few_step", "style"], [1.0, 0.3])
scaling = pipe.transformer.transformer_blocks[0].attn.to_q.scaling
text = torch.Generator().manual_seed(3)
embeds, pooled = torch.randn(1, 5, 32, generator=text), torch.randn(1, 32, generator=text)


def picture(**kwargs):
    return pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=64, width=64, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0), **kwargs,
    ).images


first = picture()
seen = {}
for scale in (0.5, 0.0):
    picture(joint_attention_kwargs={"scale": scale})
    off = float((picture() - first).norm() / first.norm())
    few_step, style = (round(scaling[name], 3) for name in ("few_step", "style"))
    print(f"after a call at scale {scale}: {few_step} and {style}, off by {off:.2g}")
    seen[scale] = (few_step, style, off)
assert seen[0.5][:2] == (1.0, 0.3) and seen[0.5][2] < 1e-5
assert seen[0.0][:2] == (1.0, 1.0) and seen[0.0][2] > 0.01
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
