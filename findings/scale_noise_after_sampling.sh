#!/usr/bin/env bash
# A scheduler that has drawn pictures adds no noise any more: scale_noise and add_noise ignore the timesteps.
#
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.23.0, numpy 2.4.6.
# Behaviour: the pipelines of FLUX, Z-Image, Qwen-Image, Krea 2, Wan, SDXL and others call `set_begin_index` on their
#   scheduler, and that stays set when the call has ended. From then on `scale_noise(data, t, noise)` does not look at t:
#   every row gets the level at which the sampler stands, and after the last step that is 0. The data come back as they
#   are. EulerDiscrete, DPM-Solver++ and UniPC do it in `add_noise`; DDPMScheduler does not. SD3's pipeline leaves the
#   index alone: there the same line raises an IndexError, since a 4-step schedule does not hold those timesteps.
# One would have guessed: the level of each row's timestep, as in the same line before the pipeline's call, or an error.
#   The docstring calls the argument "the current timestep in the diffusion chain".
# Who is hurt: training loops with one scheduler for the loss and for pictures between epochs. Up to the first pictures
#   all is right, from then on the network is trained on clean data under every timestep. The loss stays finite.
# What helps: give the pipeline a scheduler of its own (`from_config`), or compute (1 - s) x + s noise oneself.
#
# Output seen (2026-11-28), the factor of the noise for four rows with different timesteps:
#   FluxPipeline, FlowMatchEulerDiscrete   before 0.900 0.600 0.300 0.050   after 0.000 0.000 0.000 0.000
#   EulerDiscrete                          before 60.271 6.135 1.234 0.173   after 0.000 0.000 0.000 0.000
#   DPMSolverMultistep                     before 0.899 0.599 0.300 0.050   after 0.000 0.000 0.000 0.000
#   UniPCMultistep                         before 0.900 0.600 0.301 0.051   after 0.000 0.000 0.000 0.000
#   DDPM                                   before 1.000 0.987 0.777 0.170   after 1.000 0.987 0.777 0.170
#   StableDiffusion3Pipeline, FlowMatchEulerDiscrete: IndexError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.23.0 numpy==2.4.6
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import (
    DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline,
    FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline, UniPCMultistepScheduler,
)
from diffusers.utils import logging

logging.set_verbosity_error()
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
NO_TEXT = dict(vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
CALL = dict(
    prompt_embeds=torch.zeros(1, 4, 32), pooled_prompt_embeds=torch.zeros(1, 32), height=64, width=64,
    num_inference_steps=4, guidance_scale=1.0, output_type="latent",
)


def flux(scheduler):
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )
    pipe = FluxPipeline(scheduler, transformer=network, **NO_TEXT)
    pipe.set_progress_bar_config(disable=True)
    pipe(**CALL)


def sd3(scheduler):
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    pipe = StableDiffusion3Pipeline(
        scheduler=scheduler, transformer=network, text_encoder_3=None, tokenizer_3=None, **NO_TEXT
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(**CALL)


def draw(scheduler):
    """What the pipelines of SDXL and Wan do with their scheduler."""
    scheduler.set_timesteps(4)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.zeros(1, 1, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]


def noise_factors(scheduler, times):
    data, noise = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(data, times, noise)[:, 0, 0, 0]
    return scheduler.add_noise(data, noise, times)[:, 0, 0, 0]


def around(scheduler, pictures, title=""):
    scheduler.set_timesteps(1000)
    times = scheduler.timesteps[[100, 400, 700, 950]].clone()
    before = noise_factors(scheduler, times)
    pictures(scheduler)
    after = noise_factors(scheduler, times)
    rows = [" ".join(f"{v:.3f}" for v in values.tolist()) for values in (before, after)]
    title += type(scheduler).__name__.removesuffix("Scheduler")
    print(f"{title:38} before {rows[0]}   after {rows[1]}")
    return before, after


for scheduler, pictures, title in (
    (FlowMatchEulerDiscreteScheduler(), flux, "FluxPipeline, "),
    (EulerDiscreteScheduler(), draw, ""),
    (DPMSolverMultistepScheduler(**FLOW), draw, ""),
    (UniPCMultistepScheduler(**FLOW), draw, ""),
):
    before, after = around(scheduler, pictures, title)
    assert (before.diff() < 0).all() and (before > 0.04).all() and (after == 0).all()
before, after = around(DDPMScheduler(), draw)
assert torch.equal(before, after) and (before > 0.1).all()
try:
    around(FlowMatchEulerDiscreteScheduler(), sd3)
except IndexError:
    print("StableDiffusion3Pipeline, FlowMatchEulerDiscrete: IndexError")
else:
    raise AssertionError("SD3's pipeline sets the index, too")
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
