#!/usr/bin/env bash
# A DoRA at strength 0 is not off: its magnitudes stay in full, and the picture is another than the base's.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: a DoRA layer scales each row of W + s B A to a learned length. The strength of `set_adapters`, `lora_scale` and the
#   call's `scale` multiplies B A alone. The lengths are at full strength from the smallest s on, and at 0 itself. The
#   file loads with the calls of a LoRA, and nothing says that its dial is another one.
# One would have guessed: strength 0 is the base, as with every LoRA, and half is about half. diffusers documents
#   the strength for adapters at large, and PEFT's help of `use_dora` says nothing of it.
# Who is hurt: whoever compares "without" at 0 with "with" at 1; whoever sweeps a dial, or offers one; whoever keeps a
#   second adapter loaded at 0 beside a few-step LoRA: it goes on acting, in every pass.
# What helps: `disable_lora()`, or leave the name out of `set_adapters`; for a dial, mix the outputs' weights by hand (fuse
#   at 1, and interpolate with the base).
#
# Output seen (2026-11-29), each trained for 300 steps on one fine-tuned network's outputs:
#   LoRA: change from the base at 1.0 1.000, at 0.5 0.526, at 0.1 0.111, at 0.0 0.000, disabled 0.000
#   DoRA: change from the base at 1.0 1.000, at 0.5 0.653, at 0.1 0.386, at 0.0 0.347, disabled 0.000
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
from peft import LoraConfig

logging.set_verbosity_error()
torch.set_num_threads(1)
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]


def network():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()


def outputs(model, batch):
    x, text, pooled, t = batch
    return model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]


def draw(seed, rows=8):
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, 4, 8, 8), (rows, 5, 32), (rows, 32))
    return *(torch.randn(shape, generator=g) for shape in shapes), 1000 * torch.rand(rows, generator=g)


def taught(dora):
    """A fine-tuned network's changes, learned by an adapter of rank 4."""
    teacher, model = network(), network()
    noise = torch.Generator().manual_seed(1)
    for name, value in teacher.named_parameters():
        if any(f"{target}.weight" in name for target in TARGETS):
            value.data += 0.5 * value.data.std() * torch.randn(value.shape, generator=noise)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, use_dora=dora, target_modules=TARGETS), "tuned")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(300):
        batch = draw(100 + step)
        with torch.no_grad():
            wanted = outputs(teacher, batch)
        (outputs(model, batch) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def told(kind, dora):
    model, batch = taught(dora), draw(1)
    with torch.no_grad():
        base = outputs(network(), batch)
        found = {}
        for strength in (1.0, 0.5, 0.1, 0.0):
            model.set_adapters(["tuned"], [strength])
            found[strength] = float((outputs(model, batch) - base).norm())
        model.disable_lora()
        off = float((outputs(model, batch) - base).norm())
    shares = {strength: value / found[1.0] for strength, value in found.items()}
    line = ", ".join(f"at {strength} {share:.3f}" for strength, share in shares.items())
    print(f"{kind}: change from the base {line}, disabled {off / found[1.0]:.3f}")
    return shares, off


shares, off = told("LoRA", False)
assert shares[0.0] == 0 and off == 0
shares, off = told("DoRA", True)
assert shares[0.0] > 0.1 and off == 0
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
