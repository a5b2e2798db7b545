#!/usr/bin/env bash
# A flow-matching scheduler with `shift_terminal`, asked for one step, has NaN as its only noise level.
#
# Versions: diffusers 0.42.1, torch 2.13.0, numpy 2.4.6.
# Behaviour: FlowMatchEulerDiscreteScheduler stretches its grid so that the last level before 0 is `shift_terminal`. With
#   one step the last level is also the first, 1, and the stretch divides 0 by 0: sigmas are [nan, 0]. numpy warns of an
#   invalid value; the scheduler raises nothing, and `step` hands on latents that are all NaN.
# One would have guessed: [1, 0], as without `shift_terminal`, or an error. The same scheduler is right from two steps on.
# Who is hurt: one-step students of models whose scheduler has the setting (Qwen-Image's is .02; the public few-step
#   LoRAs for it set it to null by hand): every latent is NaN, and the model looks broken.
# What helps: refuse one step there, or take `shift_terminal` out of the student's scheduler.
#
# Output seen (2026-11-28):
#   1 step : [nan, 0.0]
#   2 steps: [1.0, 0.02, 0.0]
#   4 steps: [1.0, 0.796, 0.4976, 0.02, 0.0]
#   one step of the sampler: all of 16 latents NaN
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 numpy==2.4.6
cat > "$work/try.py" <<'PY'
import math
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def grid(steps: int):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    levels = [1 - k / steps for k in range(steps)]
    scheduler.set_timesteps(steps, sigmas=levels, mu=1.0)
    print(f"{steps} step{'s' if steps > 1 else ' '}: {[round(s, 4) for s in scheduler.sigmas.tolist()]}")
    return scheduler


one, two, four = grid(1), grid(2), grid(4)
assert math.isnan(one.sigmas[0]) and one.sigmas[1] == 0
for scheduler in (two, four):
    assert torch.isfinite(scheduler.sigmas).all() and abs(float(scheduler.sigmas[-2]) - 0.02) < 1e-6
one.set_begin_index(0)  # as the pipelines do
latents = one.step(torch.ones(1, 1, 4, 4), one.timesteps[0], torch.zeros(1, 1, 4, 4)).prev_sample
print(f"one step of the sampler: {'all' if latents.isnan().all() else 'not all'} of {latents.numel()} latents NaN")
assert latents.isnan().all()
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
