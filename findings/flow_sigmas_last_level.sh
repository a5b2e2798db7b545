#!/usr/bin/env bash
# DEIS and SA-Solver with flow sigmas never reach 0: their last step does nothing, and the picture keeps its noise.
#
# Versions: diffusers 0.42.1, torch 2.13.0, numpy 2.4.6, scipy 1.17.1.
# Behaviour: with `use_flow_sigmas` both repeat the last level where DPM-Solver++ and UniPC put 0. The last of N network
#   calls is thrown away, and the latents stay at the level before it. `final_sigmas_type="zero"`, which `from_config`
#   takes along from DPM-Solver++, is not read. Nothing is raised or warned.
# One would have guessed: levels that end in 0. `use_flow_sigmas` and `flow_shift` are documented in the same words for
#   all these solvers, and `from_config` is the documented way to change a pipeline's scheduler.
# Who is hurt: whoever changes the sampler of SANA, or of another flow model whose scheduler is DPM-Solver++ or UniPC. With
#   shift 3 the picture is decoded at level .5 after 4 steps, at .14 after 20. A comparison of samplers counts this
#   against the solver.
# What helps: take DPM-Solver++ or UniPC; look at `scheduler.sigmas[-1]`.
#
# Output seen (2026-11-28), data that are one point, so that every right sampler ends on it exactly:
#   DPMSolverMultistep     4 steps: levels 0.9997 0.8996 0.7496 0.4997 0.0000  noise left 0.000
#   UniPCMultistep         4 steps: levels 1.0000 0.9001 0.7504 0.5010 0.0000  noise left 0.000
#   DEISMultistep          4 steps: levels 0.9997 0.8996 0.7496 0.4997 0.4997  noise left 0.500
#   SASolver               4 steps: levels 0.9997 0.8996 0.7496 0.4997 0.4997  noise left 0.500
#   noise left after 20 steps: DPMSolverMultistep 0.000, UniPCMultistep 0.000, DEISMultistep 0.136, SASolver 0.136
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 numpy==2.4.6 scipy==1.17.1
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import (
    DEISMultistepScheduler, DPMSolverMultistepScheduler, SASolverScheduler, UniPCMultistepScheduler,
)

SANA = DPMSolverMultistepScheduler(
    use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++",
    solver_order=2, final_sigmas_type="zero",
)


def noise_left(kind, steps: int):
    """How far from the data the sampler ends, in units of the noise, and its levels."""
    ode = dict(tau_func=lambda t: 0, algorithm_type="data_prediction")  # SA-Solver's own names, and no noise of its own
    extra = ode if kind is SASolverScheduler else {}
    scheduler = kind.from_config(SANA.config, **extra)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    data, noise = torch.full((1, 1, 4, 4), 0.7), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = (1 - scheduler.sigmas[0]) * data + scheduler.sigmas[0] * noise
    for level, t in zip(scheduler.sigmas, scheduler.timesteps):
        x = scheduler.step((x - data) / level, t, x, return_dict=False)[0]  # the exact velocity of this data
    return float((x - data).norm() / (noise - data).norm()), scheduler.sigmas


kinds = (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, SASolverScheduler)
many = {}
for kind in kinds:
    name = kind.__name__.removesuffix("Scheduler")
    left, levels = noise_left(kind, 4)
    row = " ".join(f"{v:.4f}" for v in levels.tolist())
    print(f"{name:22} 4 steps: levels {row}  noise left {left:.3f}")
    many[name], _ = noise_left(kind, 20)
    if kind in kinds[:2]:
        assert levels[-1] == 0 and left < 1e-5 and many[name] < 1e-5
    else:
        assert levels[-1] == levels[-2] > 0.4 and abs(left - float(levels[-1])) < 1e-3 and many[name] > 0.1
print("noise left after 20 steps: " + ", ".join(f"{name} {left:.3f}" for name, left in many.items()))
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
