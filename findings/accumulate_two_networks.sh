#!/usr/bin/env bash
# accelerate counts micro-batches over all networks: of two that are trained in turn, one never takes a step.
#
# Versions: accelerate 1.15.0, torch 2.13.0.
# Behaviour: `accumulate(network)` adds 1 to one counter of the Accelerator, whichever network it is given, and lets optimizers
#   step where the counter is a multiple of `gradient_accumulation_steps`. A generator and a fake score (or a
#   discriminator) in turn, with 2 steps to gather: the generator has the odd calls and never steps, the other steps at every
#   micro-batch, with half its gradient. The generator's gradient grows by each micro-batch, as `zero_grad` is left out too.
#   Nothing is raised or warned, losses are printed as ever, and `optimizer.step_was_skipped` says False.
# One would have guessed: each network has its count. The call takes the networks; what the argument does, leaving
#   out the exchange between ranks, is per network.
# Who is hurt: whoever raises `gradient_accumulation_steps` from 1 in a loop of distribution matching or of a GAN, to fit a
#   large model. With 5 fake-score updates to one of the generator it stands still for 2, 3, 4 and 6, and works for 5,
#   which has no factor in common with the 6 calls of an iteration.
# What helps: `accumulate(generator, fake_score)` around an iteration that updates each once; else count by hand, with
#   `no_sync`. Look at whether the weights move.
#
# Output seen (2026-11-29), 60 iterations, optimizer steps of generator and fake score, and what one would have guessed:
#   1 fake-score update, 1 to gather: generator 60 of 60, fake score  60 of  60
#   1 fake-score update, 2 to gather: generator  0 of 30, fake score  60 of  30
#   1 fake-score update, 4 to gather: generator  0 of 15, fake score  30 of  15
#   5 fake-score updates, 2 to gather: generator  0 of 30, fake score 180 of 150
#   5 fake-score updates, 4 to gather: generator  0 of 15, fake score  90 of  75
#   1 fake-score update, 2 to gather, one accumulate(generator, fake score) an iteration: generator 30, fake score 30
#   after 60 iterations the generator has gathered 60 micro-batches in its gradient, the weights have moved by 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q accelerate==1.15.0
cat > "$work/try.py" <<'PY'
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(1)
ITERATIONS = 60


def run(updates, gathered, together=False):
    """Counts how often the weights of the two networks move; the generator's gradient at the end."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=gathered)
    pairs = {}
    for name in ("generator", "fake score"):
        network = torch.nn.Linear(2, 1, bias=False)
        pairs[name] = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=1e-3))
    steps = dict.fromkeys(pairs, 0)
    skipped = False
    both = [network for network, _ in pairs.values()]
    for _ in range(ITERATIONS):
        around = accelerator.accumulate(*both) if together else nullcontext()
        with around:
            for name in ("generator", *(["fake score"] * updates)):
                network, optimizer = pairs[name]
                each = nullcontext() if together else accelerator.accumulate(network)
                with each:
                    before = network.weight.detach().clone()
                    accelerator.backward(network(torch.ones(1, 2)).sum())
                    optimizer.step()
                    skipped = skipped or optimizer.step_was_skipped
                    optimizer.zero_grad()
                    steps[name] += int(not torch.equal(before, network.weight))
    left = pairs["generator"][0].weight.grad
    assert not skipped
    return steps, 0.0 if left is None else float(left.mean())


def told(updates, gathered):
    steps, left = run(updates, gathered)
    right = ITERATIONS // gathered
    generator, fake = steps["generator"], steps["fake score"]
    print(
        f"{updates} fake-score update{'s' if updates > 1 else ''}, {gathered} to gather: "
        f"generator {generator:2} of {right}, fake score {fake:3} of {updates * right:3}"
    )
    return generator, fake, left


assert told(1, 1)[:2] == (60, 60)
generator, fake, left = told(1, 2)
assert (generator, fake) == (0, 60) and abs(left - ITERATIONS / 2) < 1e-3
assert told(1, 4)[:2] == (0, 30)
assert told(5, 2)[:2] == (0, 180)
assert told(5, 4)[:2] == (0, 90)
for gathered, moved in ((3, 0), (6, 0), (5, 12)):
    assert run(5, gathered)[0]["generator"] == moved
together = run(1, 2, together=True)[0]
print(
    "1 fake-score update, 2 to gather, one accumulate(generator, fake score) an iteration: "
    f"generator {together['generator']}, fake score {together['fake score']}"
)
assert set(together.values()) == {30}
print(
    f"after {ITERATIONS} iterations the generator has gathered {2 * left:.0f} micro-batches in its gradient, "
    "the weights have moved by 0"
)
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
