#!/usr/bin/env bash
# A fresh DPM-Solver++, UniPC or DEIS scheduler adds noise the wrong way round: all of it at t = 0, none at t = 999.
#
# Versions: diffusers 0.42.1, torch 2.13.0, numpy 2.4.6.
# Behaviour: `add_noise` looks a timestep up in `timesteps` and takes the level of the same place in `sigmas`. As these
#   schedulers are built, timesteps fall and sigmas rise. Until `set_timesteps` has been called, t means 999 - t. With
#   `use_flow_sigmas` the levels are also not the flow's 0 to 1: they are those of a diffusion, up to 157, so that t = 0
#   gives 157 noise - 156 data. After `set_timesteps(1000)` the same call is right. Nothing is raised or warned.
# One would have guessed: what DDPMScheduler and EulerDiscreteScheduler do, more noise at larger t. The comment in
#   `add_noise` names training as the case of a scheduler that no pipeline has used yet.
# Who is hurt: whoever trains with the scheduler that a model is published with (SANA: DPM-Solver++, Wan: UniPC) by
#   `scheduler.add_noise(latents, noise, t)` and tells the network t. It sees the level of 999 - t under t, and sampling
#   then asks it at the right levels. With flow sigmas most inputs are also many times too large. The loss is finite.
# What helps: compute (1 - s) x + s noise oneself, or call `set_timesteps` with all training steps first.
#
# Output seen (2026-11-28), the factor of the noise at t = 0, 250, 500, 750, 999:
#   DDPM                  0.010   0.692   0.960   0.998   1.000
#   DPMSolverMultistep    1.000   0.998   0.960   0.690   0.010
#   DPMSolverSinglestep   1.000   0.998   0.960   0.690   0.010
#   UniPCMultistep        1.000   0.998   0.960   0.690   0.010
#   DEISMultistep         1.000   0.998   0.960   0.690   0.010
#   DPMSolverMultistep, flow  157.407  17.247   3.424   0.953   0.010
#   UniPCMultistep, flow      157.407  17.247   3.424   0.953   0.010
#   after set_timesteps(1000): more noise at larger t, in all of them
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 numpy==2.4.6
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import (
    DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

logging.set_verbosity_error()
TIMES = torch.tensor([0, 250, 500, 750, 999])
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


def noise_factors(scheduler, times):
    data, noise = torch.zeros(len(times), 1), torch.ones(len(times), 1)
    return scheduler.add_noise(data, noise, times)[:, 0]


def show(title, kind, **settings):
    scheduler = kind(**settings)
    fresh = noise_factors(scheduler, TIMES)
    print(f"{title:32}" + "".join(f"{v:8.3f}" for v in fresh.tolist()))
    scheduler.set_timesteps(1000)
    places = [len(scheduler.timesteps) - 1 - int(t) for t in TIMES]
    after = noise_factors(scheduler, scheduler.timesteps[places])  # the same places of the finished schedule
    assert (after.diff() > 0).all(), f"{title}: the finished schedule is not right either"
    return fresh


right = show("DDPM", DDPMScheduler)
assert (right.diff() > 0).all()
for kind in (DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler):
    factors = show(kind.__name__.removesuffix("Scheduler"), kind)
    assert (factors.diff() < 0).all() and torch.allclose(factors, right.flip(0), atol=0.01)
for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
    factors = show(kind.__name__.removesuffix("Scheduler") + ", flow", kind, **FLOW)
    assert (factors.diff() < 0).all() and factors[0] > 100
print("after set_timesteps(1000): more noise at larger t, in all of them")
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
