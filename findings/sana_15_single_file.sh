#!/usr/bin/env bash
# A SANA 1.5 file in its makers' names cannot be read by from_single_file; a SANA 1.0 file can.
#
# Versions: diffusers 0.42.1, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: the converter of SANA's transformer knows no attn.q_norm, attn.k_norm and their like of the cross
#   attention, which SANA 1.5 has (qk_norm="rms_norm_across_heads"), and leaves them out without a word. The model then
#   has four norms a block without values, and loading ends in torch's error about copying out of a meta tensor. The
#   same file without norms is read, and every weight is equal.
# One would have guessed: diffusers has SANA 1.5 as a folder and a converter for "sana", so its file loads; at worst the
#   error names a key.
# Who is hurt: who trains or merges SANA 1.5 into one file for other programs and reads it back, or has only such a
#   file.
# What helps: keep the diffusers folder beside the file, and read that.
#
# Output seen (2026-11-28):
#   SANA 1.0: equal
#   SANA 1.5: NotImplementedError about a meta tensor
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from diffusers import SanaTransformer2DModel
from diffusers.utils import logging
from safetensors.torch import save_file

logging.set_verbosity_error()
work, norms = sys.argv[1], sys.argv[2] == "1.5"
made = SanaTransformer2DModel(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
    num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
    sample_size=8, patch_size=1, qk_norm="rms_norm_across_heads" if norms else None,
)
with torch.no_grad():
    for name, value in made.named_parameters():
        if ".norm_q." in name or ".norm_k." in name:
            value.fill_(3.0)
made.save_pretrained(work + "/config")
w = made.state_dict()
EMBED = {
    "x_embedder.proj": "patch_embed.proj", "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2", "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
native = {f"{a}.{kind}": w[f"{b}.{kind}"] for a, b in EMBED.items() for kind in ("weight", "bias")}
native["attention_y_norm.weight"] = w["caption_norm.weight"]
native["final_layer.scale_shift_table"] = w["scale_shift_table"]
native["pos_embed"], native["y_embedder.y_embedding"] = torch.zeros(1), torch.zeros(1)
for i in range(2):
    old, new = f"transformer_blocks.{i}", f"blocks.{i}"
    native[f"{new}.scale_shift_table"] = w[f"{old}.scale_shift_table"]
    native[f"{new}.attn.qkv.weight"] = torch.cat([w[f"{old}.attn1.to_{c}.weight"] for c in "qkv"])
    if norms:
        native[f"{new}.attn.q_norm.weight"] = w[f"{old}.attn1.norm_q.weight"]
        native[f"{new}.attn.k_norm.weight"] = w[f"{old}.attn1.norm_k.weight"]
        native[f"{new}.cross_attn.q_norm.weight"] = w[f"{old}.attn2.norm_q.weight"]
        native[f"{new}.cross_attn.k_norm.weight"] = w[f"{old}.attn2.norm_k.weight"]
    for kind in ("weight", "bias"):
        native[f"{new}.attn.proj.{kind}"] = w[f"{old}.attn1.to_out.0.{kind}"]
        native[f"{new}.cross_attn.q_linear.{kind}"] = w[f"{old}.attn2.to_q.{kind}"]
        native[f"{new}.cross_attn.kv_linear.{kind}"] = torch.cat([w[f"{old}.attn2.to_{c}.{kind}"] for c in "kv"])
        native[f"{new}.cross_attn.proj.{kind}"] = w[f"{old}.attn2.to_out.0.{kind}"]
        for conv in ("inverted", "depth", "point"):
            key = f"{old}.ff.conv_{conv}.{kind}"
            if key in w:
                native[f"{new}.mlp.{conv}_conv.conv.{kind}"] = w[key]
save_file({k: v.contiguous() for k, v in native.items()}, work + "/sana.safetensors")
try:
    read = SanaTransformer2DModel.from_single_file(work + "/sana.safetensors", config=work + "/config").state_dict()
    print("equal" if all(torch.equal(read[name], w[name]) for name in w) else "read, and other weights")
except Exception as error:
    print(type(error).__name__, "about a meta tensor" if "meta tensor" in str(error) else error)
PY
said=$(for version in 1.0 1.5; do
  echo "SANA $version: $("$work/venv/bin/python" "$work/try.py" "$work" "$version" 2> /dev/null | tail -1)"
done)
echo "$said"
[ "$said" = "SANA 1.0: equal
SANA 1.5: NotImplementedError about a meta tensor" ]
