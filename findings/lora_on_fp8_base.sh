#!/usr/bin/env bash
# A LoRA that PEFT puts on a base kept in fp8 is drawn in fp8, and cast up afterwards.
#
# Versions: peft 0.21.2, diffusers 0.42.1, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: PEFT moves a new adapter to the device and the type of its base layer before it draws the weights. On a
#   transformer with diffusers' layerwise casting (storage in float8_e4m3fn) A is drawn in 8 bits. `get_peft_model`
#   then casts it to fp32, as `autocast_adapter_dtype=True` promises; diffusers' `add_adapter` leaves it in fp8.
#   Either way A of rank 32 has some 60 different values among 1,024, and 2 to 3% of it are exact zeros.
# One would have guessed: the adapter "in float32" holds fp32 draws of a Gaussian: 1,024 different values, no zero. On a
#   bf16 base the same happens in a milder form (some 700 values of 1,024).
# Who is hurt: whoever trains a LoRA over an 8-bit base to save memory. The type says fp32, so nothing looks wrong; the
#   start of training is a coarser one than the same seed gives on a bf16 base, and runs are not comparable.
# What helps: draw A once more in fp32 after the adapter has been added.
#
# Output seen (2026-11-28):
#   add_adapter     on fp8  base: float8_e4m3fn   60 values of 1024, 2.9% zeros
#   get_peft_model  on fp8  base: float32         60 values of 1024, 2.9% zeros
#   get_peft_model  on bf16 base: float32        685 values of 1024, 0.0% zeros
#   get_peft_model  on fp32 base: float32       1024 values of 1024, 0.0% zeros
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import SD3Transformer2DModel
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model

logging.set_verbosity_error()
SIZES = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    pos_embed_max_size=8,
)


def drawn(how: str, base: str):
    torch.manual_seed(0)
    network = SD3Transformer2DModel(**SIZES)
    if base != "fp32":
        network = network.to(torch.bfloat16)
    if base == "fp8":
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    config = LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian", target_modules=["to_q"])
    if how == "add_adapter":
        network.add_adapter(config)
    else:
        network = get_peft_model(network, config)
    (a,) = [p.detach() for name, p in network.named_parameters() if "lora_A" in name]
    values, zeros = a.float().unique().numel(), float((a.float() == 0).float().mean())
    kind = str(a.dtype).removeprefix("torch.")
    print(f"{how:15} on {base:4} base: {kind:13} {values:4} values of {a.numel()}, {zeros:.1%} zeros")
    return a.dtype, values, zeros


added = drawn("add_adapter", "fp8")
wrapped = drawn("get_peft_model", "fp8")
half = drawn("get_peft_model", "bf16")
full = drawn("get_peft_model", "fp32")
assert added[0] == torch.float8_e4m3fn and added[1] < 100 and added[2] > 0.005
assert wrapped[0] == torch.float32 and wrapped[1] < 100 and wrapped[2] > 0.005
assert half[0] == torch.float32 and 100 < half[1] < 900
assert full[0] == torch.float32 and full[1] > 1000 and full[2] == 0
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
