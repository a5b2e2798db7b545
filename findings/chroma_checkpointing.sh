#!/usr/bin/env bash
# Gradient checkpointing makes another network of Chroma: its single-stream blocks lose the text mask.
#
# Versions: diffusers 0.42.1, torch 2.13.0.
# Behaviour: ChromaTransformer2DModel hands `attention_mask` to its double-stream blocks, and to its single-stream blocks (38
#   of the published 57) only while gradients are off or checkpointing is. With `enable_gradient_checkpointing()` and
#   gradients on, those blocks attend without it: wherever a prompt has padding, outputs and gradients are those of
#   another function. The attention processors' arguments are left out in the same way. Nothing is raised or warned.
# One would have guessed: the same numbers for less memory, as in FLUX, of which Chroma is a variant, and as torch and
#   diffusers document checkpointing.
# Who is hurt: whoever trains Chroma, or a LoRA for it, with checkpointing to save memory: it is trained as one network
#   and sampled as another. In distillation the teacher, which runs without gradients, has the mask, and the
#   student has not: the loss of two equal networks is not 0.
# What helps: a checkpoint of one's own around each block, with all its arguments; or compare one output both ways.
#
# Output seen (2026-11-28), one network and one input with 4 of 16 text tokens in use:
#   Chroma   output with and without checkpointing: off by 0.015, gradient of the first block off by 0.034
#   Chroma   no padding                           : off by 9.8e-08, gradient of the first block off by 1.8e-07
#   FLUX.1   output with and without checkpointing: off by 0, gradient of the first block off by 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1
cat > "$work/try.py" <<'PY'
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

TEXT, IMAGE = 16, 16
SIZES = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, axes_dims_rope=[4, 4, 8],
)


def inputs(tokens: int, family: str):
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(IMAGE, 3)
    ids[:, 1], ids[:, 2] = torch.arange(IMAGE) // 4, torch.arange(IMAGE) % 4
    given = dict(
        hidden_states=torch.randn(1, IMAGE, 4, generator=draw), timestep=torch.tensor([0.5]),
        encoder_hidden_states=torch.randn(1, TEXT, 32, generator=draw), img_ids=ids, txt_ids=torch.zeros(TEXT, 3),
    )
    if family == "FLUX.1":
        return {**given, "pooled_projections": torch.randn(1, 32, generator=draw)}
    # Chroma's pipeline: true for the tokens of the prompt and of the image, in the type of the embeddings
    mask = torch.cat([torch.arange(TEXT) < tokens, torch.ones(IMAGE, dtype=torch.bool)])
    return {**given, "attention_mask": mask[None].float()}


def both_ways(network, given):
    """The outputs and the first block's gradients without and with checkpointing: how far apart, relatively."""
    weight, seen = network.transformer_blocks[0].attn.to_q.weight, []
    for switch in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        switch()
        output = network(**given).sample
        (gradient,) = torch.autograd.grad(output.square().sum(), weight)
        seen.append((output.detach(), gradient))
    return tuple(float((a - b).norm() / a.norm()) for a, b in zip(*seen))


def show(title, network, given):
    output, gradient = both_ways(network, given)
    print(f"{title}: off by {output:.2g}, gradient of the first block off by {gradient:.2g}")
    return output, gradient


torch.manual_seed(0)
chroma = ChromaTransformer2DModel(
    **SIZES, approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=1
).train()
flux = FluxTransformer2DModel(**SIZES, pooled_projection_dim=32).train()
BOTH = "output with and without checkpointing"
padded = show(f"Chroma   {BOTH}", chroma, inputs(4, "Chroma"))
whole = show(f"Chroma   {'no padding':{len(BOTH)}}", chroma, inputs(TEXT, "Chroma"))
other = show(f"FLUX.1   {BOTH}", flux, inputs(TEXT, "FLUX.1"))
assert min(padded) > 1e-3, "the mask reaches the single-stream blocks"
assert max(whole) < 1e-5 and max(other) < 1e-5
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"
