#!/usr/bin/env bash
# With Karras, exponential or beta spacing, the solvers of a flow model take a diffusion model's noise levels: NaN.
#
# Versions: torch 2.13.0, diffusers 0.42.1.
# Behaviour: the multistep solvers take `use_flow_sigmas=True` together with `use_karras_sigmas`,
#   `use_exponential_sigmas` or `use_beta_sigmas`, and say nothing. The spacing is then between the levels of the
#   default betas (157 to .03), not between 1 and 0, and `flow_shift` is not read. `step` takes 1 - σ for the signal's
#   part, so its logarithm is NaN, and so is the picture. UniPC with Karras alone stays in the flow, at levels that do
#   not know `flow_shift`. FlowMatchEulerDiscreteScheduler spaces all three between the flow's own ends.
# One would have guessed: what Euler does; or an error, as two spacings at once give.
# Who is hurt: whoever swaps the solver of SANA, Wan or another flow model by
#   `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)`, as guides show for diffusion
#   models: black pictures, and with UniPC and Karras pictures that lost their shift.
# What helps: Euler's scheduler for such spacings; or the levels made by hand and given to UniPC as `sigmas`.
#
# Output seen (2026-11-29), with the exact velocity of data that is .5 everywhere, 8 steps, flow_shift 3:
#   FlowMatchEulerDiscreteScheduler   karras 1.00 ok            exponential 1.00 ok        beta 1.00 ok
#   UniPCMultistepScheduler           karras 0.99 ok            exponential 157.41 NaN     beta 157.41 NaN
#   DPMSolverMultistepScheduler       karras 157.41 NaN         exponential 157.41 NaN     beta 157.41 NaN
#   DPMSolverSinglestepScheduler      karras 157.41 NaN         exponential 157.41 NaN     beta 157.41 NaN
#   DEISMultistepScheduler            karras 157.41 NaN         exponential 157.41 NaN     beta 157.41 NaN
#   SASolverScheduler                 karras 157.41 NaN         exponential 157.41 NaN     beta 157.41 NaN
#   UniPC's Karras levels at flow_shift 1 and 7: the same
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.23.0 scipy numpy
cat > "$work/try.py" <<'PY'
import inspect
import logging
import sys
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import diffusers
import torch

SPACINGS = ("karras", "exponential", "beta")
SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
           "DEISMultistepScheduler", "SASolverScheduler")


def made(name, spacing, shift=3.0):
    options = {f"use_{spacing}_sigmas": True}
    if name == "FlowMatchEulerDiscreteScheduler":
        options["shift"] = shift
    else:
        options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(8)
    return scheduler


def found(name, spacing):
    scheduler = made(name, spacing)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = "generator" in inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        more = {"generator": torch.Generator().manual_seed(i)} if drawn else {}
        velocity = (x - 0.5) / max(float(t) / 1000, 1e-3)
        x = scheduler.step(velocity, t, x, **more).prev_sample
    return f"{float(scheduler.sigmas.max()):.2f}", "ok" if bool(x.isfinite().all()) else "NaN"


right = True
for name in ("FlowMatchEulerDiscreteScheduler", *SOLVERS):
    rows = {spacing: found(name, spacing) for spacing in SPACINGS}
    print(f"{name:33}", *(f"{f'{s} {level} {end}':25}" for s, (level, end) in rows.items()))
    for spacing, (level, end) in rows.items():
        inside = name.startswith("Flow") or (name.startswith("UniPC") and spacing == "karras")
        right &= (float(level) <= 1 and end == "ok") if inside else (float(level) > 100 and end == "NaN")
same = torch.equal(*(made("UniPCMultistepScheduler", "karras", shift).sigmas for shift in (1.0, 7.0)))
print("UniPC's Karras levels at flow_shift 1 and 7:", "the same" if same else "differ")
sys.exit(not (right and same))
PY
"$work/venv/bin/python" "$work/try.py"
