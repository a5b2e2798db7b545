#!/usr/bin/env bash
# Pyramid Attention Broadcast gives the unguided pass of a step the attention of the guided one: guidance is off.
#
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: the cache counts a layer's calls and has one slot, whichever pass is running. The pipelines of Wan, CogView4
#   and FLUX.1 with true guidance call their network twice a step, first with the prompt, then with the negative one.
#   With a range of 2 every second call takes what the one before has left, and these are always the negative ones; no
#   pass with the prompt is ever spared. With Wan's cross attention (`cross_attention_block_skip_range=2`) both passes
#   are equal, and u + g (c - u) is c. With 3 the passes take each other's states in turn. `cache_context("cond")`, by
#   which these pipelines tell their passes apart, is not read. Nothing is raised or warned.
# One would have guessed: reuse between successive steps of the same pass, as the documentation describes it. First Block Cache
#   keeps a state for each pass. A pipeline that puts both passes into one batch is right.
# Who is hurt: whoever speeds up a teacher, or an evaluation with guidance, of these families. In the range of timesteps
#   (100 to 800 unless given) each step of Wan is one of guidance 1, whatever the scale and the negative prompt say.
# What helps: First Block Cache; or look whether the two passes differ.
#
# Output seen (2026-11-28), Wan at guidance 5 in eight steps, of which 5 to 7 are in the range: how far the two passes are apart
#   no cache            0.352 0.615 1.157 0.270 0.775 0.483 0.306 0.338
#   First Block Cache   0.352 0.615 0.837 0.318 0.366 0.390 0.279 0.259
#   PAB, cross 2        0.352 0.615 1.157 0.270 0.000 0.000 0.000 0.653
#   PAB, cross 3        0.352 0.615 1.157 0.270 0.324 0.000 0.000 0.581
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import (
    AutoencoderKLWan, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, PyramidAttentionBroadcastConfig,
    WanPipeline, WanTransformer3DModel,
)
from diffusers.utils import logging

logging.set_verbosity_error()
torch.manual_seed(0)
network = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
).eval()
with torch.no_grad():
    for value in network.parameters():
        if value.ndim > 1:
            value.normal_(std=0.3)  # so that the prompt counts
vae = AutoencoderKLWan(
    base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
)
pipe = WanPipeline(
    tokenizer=None, text_encoder=None, transformer=network, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
)
pipe.set_progress_bar_config(disable=True)
draw = torch.Generator().manual_seed(1)
prompt, negative = (torch.randn(1, 8, 16, generator=draw) for _ in range(2))
outputs = []
network.proj_out.register_forward_hook(lambda module, given, output: outputs.append(output.clone()))


def passes(title, config=None):
    """How far the two passes of each step are apart."""
    if config is not None:
        network.enable_cache(config)
    outputs.clear()
    pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, height=32, width=32, num_frames=5, num_inference_steps=8,
        guidance_scale=5.0, output_type="latent", generator=torch.Generator().manual_seed(0),
    )
    gaps = [float((with_it - without).norm() / with_it.norm()) for with_it, without in zip(outputs[::2], outputs[1::2])]
    print(f"{title:19} " + " ".join(f"{gap:.3f}" for gap in gaps))
    if config is not None:
        network.disable_cache()
    return gaps


def pab(**ranges):
    return PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: pipe.current_timestep, **ranges)


none = passes("no cache")
inside = [100 < float(t) < 800 for t in pipe.scheduler.timesteps]
block = passes("First Block Cache", FirstBlockCacheConfig(threshold=1.0))
second = passes("PAB, cross 2", pab(cross_attention_block_skip_range=2))
third = passes("PAB, cross 3", pab(cross_attention_block_skip_range=3))
assert sum(inside) == 3 and min(none) > 0.1 and min(block) > 0.1 and block != none
assert [gap == 0 for gap in second] == inside
assert sum(gap == 0 for gap in third) == 2
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
