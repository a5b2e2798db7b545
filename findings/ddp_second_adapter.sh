#!/usr/bin/env bash
# Two LoRAs trained in turn on one base under DDP: the one that was not active at the start is never averaged over ranks.
#
# Versions: torch 2.13.0, peft 0.21.2.
# Behaviour: `DistributedDataParallel` puts its gradient exchange on the parameters that have `requires_grad` when it is made.
#   PEFT leaves that flag to the active adapter alone and turns it over in `set_adapter`. So the adapter that becomes active
#   later has gradients of its own rank only, and the ranks' copies go apart. The first adapter is right. Nothing is
#   raised or warned, with `find_unused_parameters` or without: no parameter that DDP knows takes part in such a pass.
# One would have guessed: all parameters are exchanged. DDP's documentation says that it puts its functions on all of the
#   model's parameters, and asks that none be added or changed later; both adapters are there, and `set_adapter` adds none.
# Who is hurt: distribution matching with generator and fake score as two LoRAs of one base, on more than one GPU: each rank has
#   a fake score of its own, trained on its own share of the batch. The generator's gradient is then the mean of several
#   wrong scores, and a checkpoint holds rank 0's. With a policy and a value or reward adapter it is the same.
# What helps: turn `requires_grad` on for all adapters while DDP is made (`set_adapter([..., ...])`, then back), with
#   `find_unused_parameters=True`; or average the gradients by hand. Compare a checksum of the weights over the ranks.
#
# Output seen (2026-11-29), 2 ranks, 20 steps of each adapter in turn, how far the ranks' weights are apart:
#   as PEFT leaves it                    : generator 0.000, fake score 0.266
#   with find_unused_parameters=True     : generator 0.000, fake score 0.266
#   both active while DDP was made       : generator 0.000, fake score 0.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 numpy
cat > "$work/try.py" <<'PY'
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel

NAMES, STEPS = ("generator", "fake score"), 20
CASES = (
    ("as PEFT leaves it", False, False),
    ("with find_unused_parameters=True", True, False),
    ("both active while DDP was made", True, True),
)


def activate(network, names):
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(names))


def train(rank, unused, both):
    """How far the two ranks' weights are apart at the end, adapter by adapter."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    for name in NAMES:
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        network = inject_adapter_in_model(config, network, name)
    weights = {name: [p for key, p in network.named_parameters() if f".{name}." in key] for name in NAMES}
    activate(network, NAMES if both else NAMES[:1])
    whole = DistributedDataParallel(network, find_unused_parameters=unused)
    optimizers = {name: torch.optim.SGD(weights[name], lr=0.1) for name in NAMES}
    data = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        for name in NAMES:
            activate(network, [name])
            whole(torch.randn(4, 8, generator=data)).square().mean().backward()
            assert all(p.grad is not None for p in weights[name])
            optimizers[name].step()
            optimizers[name].zero_grad()
    apart = []
    for name in NAMES:
        own = torch.cat([p.detach().flatten() for p in weights[name]])
        copies = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(copies, own)
        apart.append(float((copies[0] - copies[1]).norm() / copies[0].norm()))
    return apart


def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for title, unused, both in CASES:
        generator, fake = train(rank, unused, both)
        if rank == 0:
            print(f"{title:37}: generator {generator:.3f}, fake score {fake:.3f}", flush=True)
        assert generator == 0
        assert fake == 0 if both else fake > 0.05
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
    print("as described")
PY
TORCH_CPP_LOG_LEVEL=ERROR "$work/venv/bin/python" "$work/try.py" "$work/store"
