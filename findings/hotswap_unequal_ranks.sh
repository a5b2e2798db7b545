#!/usr/bin/env bash
# A hot-swapped LoRA whose modules differ in rank or alpha is applied at the wrong strength.
#
# Versions: peft 0.21.2, diffusers 0.42.1, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: loading with `hotswap=True` looks each tensor's name ("...to_k.lora_A.style.weight") up in the file's
#   `rank_pattern` and `alpha_pattern`. These hold names of modules ("to_k"), which are matched up to the end, so that
#   nothing is found, and every module gets the commonest alpha / rank of the file. The weights themselves are right. The
#   strength that `set_adapters` had given the adapter is lost as well. Nothing is raised or warned.
# One would have guessed: the network that the same file makes when it is loaded afresh. Both libraries document swaps between
#   different ranks and strengths, and the code asks for the patterns, so they are meant to count.
# Who is hurt: servers and evaluations that swap LoRAs in a compiled pipeline. With alpha 8 throughout and rank 2 in some
#   modules, 4 in the others, the former act at half their strength, and the scores are those of no file.
# What helps: multiply alpha / rank into B, so that every module has alpha = its rank; or load afresh.
#
# Output seen (2026-11-28), a file with alpha 8, rank 4 in to_q, rank 2 in to_k:
#   loaded afresh: to_q at alpha / rank = 2, to_k at 4
#   hot-swapped  : to_q at alpha / rank = 2, to_k at 2; the same weights: True; off by 0.49 of the LoRA's effect
#   hot-swapped after set_adapters to 0.25: to_q at 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import SD3Transformer2DModel
from diffusers.utils import logging
from peft import LoraConfig

logging.set_verbosity_error()
WORK = sys.argv[1]


def network():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()


def write(folder, seed, rank_pattern):
    """A LoRA with alpha 8 and rank 4 where the pattern says nothing else, as diffusers saves it."""
    made = network()
    made.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern=rank_pattern), "style"
    )
    torch.manual_seed(seed)
    for name, value in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    made.save_lora_adapter(f"{WORK}/{folder}", adapter_name="style")


def load(made, folder, **kwargs):
    made.load_lora_adapter(
        f"{WORK}/{folder}", weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="style", **kwargs
    )


def strengths(made):
    block = made.transformer_blocks[0].attn
    return float(block.to_q.scaling["style"]), float(block.to_k.scaling["style"])


def velocity(made):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return made(
            hidden_states=torch.randn(1, 4, 8, 8, generator=draw), timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 5, 32, generator=draw),
            pooled_projections=torch.randn(1, 32, generator=draw),
        ).sample


write("first", 2, {})
write("second", 3, {"to_k": 2})
fresh, swapped, weighted = network(), network(), network()
load(fresh, "second")
swapped.enable_lora_hotswap(target_rank=4)
load(swapped, "first")
load(swapped, "second", hotswap=True)
load(weighted, "first")
weighted.set_adapters(["style"], [0.25])
load(weighted, "second", hotswap=True)

q, k = strengths(fresh)
print(f"loaded afresh: to_q at alpha / rank = {q:g}, to_k at {k:g}")
assert (q, k) == (2, 4)
q, k = strengths(swapped)
ours, theirs = (made.transformer_blocks[0].attn.to_k.lora_B["style"].weight for made in (swapped, fresh))
same = torch.equal(ours[:, :2], theirs) and not ours[:, 2:].any()
effect = velocity(fresh) - velocity(network())
off = float((velocity(swapped) - velocity(fresh)).norm() / effect.norm())
print(f"hot-swapped  : to_q at alpha / rank = {q:g}, to_k at {k:g}; the same weights: {same}; off by {off:.2f} of the LoRA's effect")
assert (q, k) == (2, 2) and same and off > 0.1
q, _ = strengths(weighted)
print(f"hot-swapped after set_adapters to 0.25: to_q at {q:g}")
assert q == 2
print("as described")
PY
"$work/venv/bin/python" "$work/try.py" "$work"
