#!/usr/bin/env bash
# The flow-map scheduler moves a whole batch by the first sample's times, if that one's are on its grid.
#
# Versions: diffusers 0.42.1, torch 2.13.0, numpy 2.4.6.
# Behaviour: `FlowMapEulerDiscreteScheduler.step` takes tensors for `timestep` and `r_timestep`. It looks the first element up in
#   its grid. Off the grid each sample gets its own level; on it all samples get the first one's. The two ends are looked up
#   by themselves, so a sample may start at another one's time and end at its own. What a sample gets
#   depends on who is first in the batch. A scheduler that is just made has a grid of 1,000: with shift 1 all whole times,
#   with another shift what is drawn from its `timesteps`. 1000, pure noise, is on every grid.
# One would have guessed: a sample's step is its own. Tensors are documented for both ends, `scale_noise` beside it does
#   take each sample's time, and the same call with times off the grid does what it should.
# Who is hurt: training and checking a flow map (AnyFlow, MeanFlow and their on-policy distillation), where (t, r) is drawn for
#   each sample: targets and rollouts are of wrong intervals. It is the same with the grid's times in another order.
# What helps: one sample a call; or `sample - (t - r) / 1000 * velocity` by hand.
#
# Output seen (2026-11-29), velocity 1, so that a sample moves by (t - r) / 1000:
#   4 steps, 1000 to 900 and 600 to 100  : moved 0.100 0.900, asked 0.100 0.500
#   4 steps, the same in the other order : moved 0.500 0.100, asked 0.500 0.100
#   as made, times drawn from its grid   : moved 0.026 0.026, asked 0.026 0.149
#   noise added at the same two times    : level 0.978 0.357, asked 0.978 0.357
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
from diffusers import FlowMapEulerDiscreteScheduler

START, VELOCITY = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)


def told(title, verb, values, wanted):
    values, wanted = values.flatten().double(), wanted.double()
    shown = (" ".join(f"{value:.3f}" for value in row.tolist()) for row in (values, wanted))
    print(f"{title:37}: {verb} {next(shown)}, asked {next(shown)}")
    return (values - wanted).abs().tolist()


def step(title, t, r, steps=None):
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    if steps is not None:
        scheduler.set_timesteps(steps)
    moved = START - scheduler.step(VELOCITY, t, START, r_timestep=r).prev_sample
    return told(title, "moved", moved, (t - r) / 1000)


t, r = torch.tensor([1000.0, 600.0]), torch.tensor([900.0, 100.0])
off = step("4 steps, 1000 to 900 and 600 to 100", t, r, steps=4)
assert off[0] < 1e-5 and abs(off[1] - 0.4) < 1e-3
off = step("4 steps, the same in the other order", t.flip(0), r.flip(0), steps=4)
assert max(off) < 1e-5
grid = FlowMapEulerDiscreteScheduler(shift=5.0)
t, r = grid.timesteps[[100, 900]].float(), grid.timesteps[[200, 950]].float()
off = step("as made, times drawn from its grid", t, r)
assert off[0] < 1e-5 and off[1] > 0.1
level = grid.scale_noise(START, t, torch.ones_like(START))
assert max(told("noise added at the same two times", "level", level, t / 1000)) < 1e-5
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
