#!/usr/bin/env bash
# Under autocast a frozen fp32 weight is cast anew in every call; the weight cache is for trained ones alone.
#
# Versions: torch 2.13.0, peft 0.21.2.
# Behaviour: within one `torch.autocast` region a layer's weight is cast to the narrow type once and kept, if it has
#   `requires_grad`. After `requires_grad_(False)` each call of the same layer casts it again, forwards, and once more
#   where gradient checkpointing computes the forward again. Nothing says so: the argument is called `cache_enabled`,
#   "whether the weight cache inside autocast should be enabled".
# One would have guessed: what never changes is what a cache keeps best. Freezing saves time, it does not cost any.
# Who is hurt: LoRAs under autocast on a base left in fp32 (accelerate's mixed_precision with PEFT): the base is nearly
#   all of the weights, and every pass reads it in fp32 and writes it in bf16. And whoever calls one model several times in a
#   region (sampling in steps, two passes of guidance) after `requires_grad_(False)`. With few rows a call the cast costs more
#   than the product. No result changes, so only a profile shows it.
# What helps: have the frozen base in bf16 before the region; or keep a narrow copy of each weight and multiply with that.
#
# Output seen (2026-11-28):
#   4 calls of a linear layer in one region       : trained 1 cast of the weight, frozen 4
#   the same with cache_enabled=False             : trained 4, frozen 4
#   PEFT LoRA, 4 passes forward and back          : base 4, A and B 1 each
#   the same with checkpointing                   : base 8
#   64 rows by 2048 x 2048, 8 calls, milliseconds : trained 18, frozen 27
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 numpy
cat > "$work/try.py" <<'PY'
import copy
import time
import warnings

warnings.filterwarnings("ignore")
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)
WIDTH, ROWS, RANK = 96, 5, 7


class Casts(TorchDispatchMode):
    """Counts casts from fp32 to bf16, by the shape of what is cast."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            shape = tuple(args[0].shape)
            self.seen[shape] = self.seen.get(shape, 0) + 1
        return function(*args, **kwargs)


def region(network, calls, cached=True, again=False):
    x = torch.randn(ROWS, WIDTH)
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        outputs = []
        for _ in range(calls):
            given = x.clone().requires_grad_()
            outputs.append(checkpoint(network, given, use_reentrant=False) if again else network(given))
        sum(output.float().sum() for output in outputs).backward()
    return casts.seen


weight = (WIDTH, WIDTH)
trained = torch.nn.Linear(WIDTH, WIDTH, bias=False)
frozen = copy.deepcopy(trained).requires_grad_(False)
found = [region(layer, 4)[weight] for layer in (trained, frozen)]
print(f"4 calls of a linear layer in one region       : trained {found[0]} cast of the weight, frozen {found[1]}")
assert found == [1, 4]
found = [region(layer, 4, cached=False)[weight] for layer in (trained, frozen)]
print(f"the same with cache_enabled=False             : trained {found[0]}, frozen {found[1]}")
assert found == [4, 4]

base = torch.nn.Sequential(copy.deepcopy(trained)).requires_grad_(False)
network = inject_adapter_in_model(LoraConfig(r=RANK, target_modules=["0"]), base)
seen = region(network, 4)
down, up = seen[(RANK, WIDTH)], seen[(WIDTH, RANK)]
print(f"PEFT LoRA, 4 passes forward and back          : base {seen[weight]}, A and B {down} each")
assert (seen[weight], down, up) == (4, 1, 1)
seen = region(network, 4, again=True)
print(f"the same with checkpointing                   : base {seen[weight]}")
assert seen[weight] == 8

large = torch.nn.Linear(2048, 2048, bias=False)
held = copy.deepcopy(large).requires_grad_(False)
x = torch.randn(64, 2048)
times = {id(large): [], id(held): []}
for _ in range(9):
    for layer in (large, held):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            begun = time.perf_counter()
            for _ in range(8):
                layer(x)
            times[id(layer)].append(1e3 * (time.perf_counter() - begun))
middle = [sorted(times[id(layer)])[4] for layer in (large, held)]
print(f"64 rows by 2048 x 2048, 8 calls, milliseconds : trained {middle[0]:.0f}, frozen {middle[1]:.0f}")
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
