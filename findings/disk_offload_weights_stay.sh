#!/usr/bin/env bash
# With group offloading to disk, changes of the weights are thrown away, and `save_pretrained` saves other numbers than the weights.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: `enable_group_offload(offload_to_disk_path=...)` writes the weights once. After each forward pass every parameter
#   becomes an empty tensor of its shape, and the next pass reads the file. `load_state_dict` and `fuse_lora` write into
#   the empty tensors: a fused LoRA is in no picture at all, since its layers count it as merged. `save_pretrained`
#   and `state_dict` hand out the empty tensors as they are: right names, types and shapes, and no weights
#   in them. Nothing is raised or warned.
# One would have guessed: the same as without a path, where the weights lie in main memory and all of this works; or an error.
#   transformers and accelerate read disk-offloaded weights back when a model is saved.
# Who is hurt: whoever fuses a few-step LoRA into a large model on a small machine, copies averaged weights in for a picture,
#   or saves the model after such a session. The last loses the model if the folder goes.
# What helps: change, fuse and save before the offloading, and offload into a new folder; or offload to main memory.
#
# Output seen (2026-11-28):
#   in memory  fused LoRA: 1.00 of its effect   load_state_dict: the new weights   saved: 67 of 67 tensors equal
#   on disk    fused LoRA: 0.00 of its effect   load_state_dict: the old weights   saved: 0 of 67 tensors equal
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

logging.set_verbosity_error()
WORK = sys.argv[1]
BLOCK = "transformer_blocks.0.attn.to_q"
LORA = {f"{BLOCK}.lora_A.weight": torch.full((4, 32), 0.25), f"{BLOCK}.lora_B.weight": torch.ones(32, 4)}


def network(seed=0, lora=False):
    torch.manual_seed(seed)
    made = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()
    if lora:
        made.load_lora_adapter(dict(LORA), prefix=None, adapter_name="few_step")
    return made


def velocity(made):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return made(
            hidden_states=torch.randn(1, 4, 8, 8, generator=draw), timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 5, 32, generator=draw),
            pooled_projections=torch.randn(1, 32, generator=draw),
        ).sample


base, adapted, other = velocity(network()), velocity(network(lora=True)), velocity(network(1))


def offloaded(made, folder):
    path = None if folder is None else f"{WORK}/{folder}"
    made.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=path)
    return made


def share(made):
    """How much of the LoRA's effect is in the network's output, but for its sign."""
    effect = adapted - base
    return abs(float(((velocity(made) - base) * effect).sum() / effect.square().sum()))


def show(title, disk):
    made = offloaded(network(lora=True), "fused" if disk else None)
    assert abs(share(made) - 1) < 1e-3
    made.fuse_lora()
    fused = share(made)
    made = offloaded(network(), "loaded" if disk else None)
    made.load_state_dict(network(1).state_dict())
    loaded = velocity(made)
    new = torch.allclose(loaded, other, atol=1e-5)
    assert new != torch.allclose(loaded, base, atol=1e-5)
    made = offloaded(network(), "saved" if disk else None)
    made.save_pretrained(f"{WORK}/written-{disk}")
    read, right = SD3Transformer2DModel.from_pretrained(f"{WORK}/written-{disk}").state_dict(), network().state_dict()
    equal = sum(torch.equal(read[name], right[name]) for name in right)
    print(
        f"{title:10} fused LoRA: {fused:.2f} of its effect   load_state_dict: the {'new' if new else 'old'} weights   "
        f"saved: {equal} of {len(right)} tensors equal"
    )
    return fused, new, equal / len(right)


fused, new, equal = show("in memory", disk=False)
assert abs(fused - 1) < 1e-3 and new and equal == 1
fused, new, equal = show("on disk", disk=True)
assert fused < 1e-3 and not new and equal < 0.5
print("as described")
PY
"$work/venv/bin/python" "$work/try.py" "$work"
