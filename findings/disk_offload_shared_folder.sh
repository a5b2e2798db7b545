#!/usr/bin/env bash
# Two models that are offloaded to one folder on disk get one set of weights: the first one's.
#
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: `enable_group_offload(offload_to_disk_path=...)` names its files by a hash of the layer's name in its model, and
#   does not write a file that is there already. A second model with the same layers writes nothing and reads the
#   first one's files in every forward pass. A pipeline's own `enable_group_offload` hands one path to all its parts, so
#   that Wan 2.2 draws all steps with its high-noise transformer. A folder that is left from an earlier
#   session does the same to a later one. Nothing is raised or warned.
# One would have guessed: files of that model and of that session, as with accelerate's disk offload, which writes them anew.
#   The argument is documented as the directory where parameters will be offloaded, for machines with little RAM.
# Who is hurt: whoever has a teacher beside its student, or Wan 2.2's two transformers of 14 billion parameters, on a small
#   machine. Evaluations of one checkpoint after another with one folder give all of them the pictures of the first.
# What helps: a new, empty folder for each model and each session, by `enable_group_offload` on each model.
#
# Output seen (2026-11-28), each distance relative to what the right weights give:
#   Wan 2.2's second transformer in its pipeline's folder: off by 1.3, and by 0 from the first one
#   the pipeline's latents                               : off by 0.63, and by 0 from those of the first transformer alone
#   a trained checkpoint in the folder of the one before : off by 1.4, and by 0 from the one before
#   each in a folder of its own                          : off by 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import (
    AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, WanPipeline, WanTransformer3DModel,
)
from diffusers.utils import logging

logging.set_verbosity_error()
WORK = sys.argv[1]
ON_DISK = dict(onload_device=torch.device("cpu"), offload_type="leaf_level")


def wan(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()


def sd3(seed):
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()


def velocity(network):
    draw = torch.Generator().manual_seed(1)
    if isinstance(network, WanTransformer3DModel):
        given = dict(
            hidden_states=torch.randn(1, 4, 2, 4, 4, generator=draw),
            encoder_hidden_states=torch.randn(1, 8, 16, generator=draw),
        )
    else:
        given = dict(
            hidden_states=torch.randn(1, 4, 8, 8, generator=draw),
            encoder_hidden_states=torch.randn(1, 5, 32, generator=draw),
            pooled_projections=torch.randn(1, 32, generator=draw),
        )
    with torch.no_grad():
        return network(timestep=torch.tensor([500.0]), **given).sample


def pipeline(first, second):
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=first, transformer_2=second, boundary_ratio=0.875,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe):
    draw = torch.Generator().manual_seed(2)
    return pipe(
        prompt_embeds=torch.randn(1, 8, 16, generator=draw), height=32, width=32, num_frames=5, num_inference_steps=8,
        guidance_scale=1.0, output_type="latent", generator=draw,
    ).frames


def off(ours, right):
    gap = float((ours - right).norm() / right.norm())
    return 0.0 if gap < 1e-5 else gap


def show(title, ours, right, other, whose):
    far, near = off(ours, right), off(ours, other)
    print(f"{title:53}: off by {far:.2g}, and by {near:.2g} from {whose}")
    assert far > 0.05 and near == 0


right, alone = latents(pipeline(wan(0), wan(1))), latents(pipeline(wan(0), wan(0)))
pipe = pipeline(wan(0), wan(1))
pipe.enable_group_offload(**ON_DISK, offload_to_disk_path=f"{WORK}/pipeline")
second = velocity(pipe.transformer_2)
show("Wan 2.2's second transformer in its pipeline's folder", second, velocity(wan(1)), velocity(wan(0)), "the first one")
show("the pipeline's latents", latents(pipe), right, alone, "those of the first transformer alone")

before, trained = velocity(sd3(0)), velocity(sd3(1))
earlier, later = sd3(0), sd3(1)
for network in (earlier, later):
    network.enable_group_offload(**ON_DISK, offload_to_disk_path=f"{WORK}/evaluation")
assert off(velocity(earlier), before) == 0
show("a trained checkpoint in the folder of the one before", velocity(later), trained, before, "the one before")

gaps = []
for seed, expected in ((0, before), (1, trained)):
    network = sd3(seed)
    network.enable_group_offload(**ON_DISK, offload_to_disk_path=f"{WORK}/own-{seed}")
    gaps.append(off(velocity(network), expected))
print(f"{'each in a folder of its own':53}: off by {max(gaps):g}")
assert max(gaps) == 0
print("as described")
PY
"$work/venv/bin/python" "$work/try.py" "$work"
