"""Qwen-Image-2.1: the makers published it in diffusers' layout. ComfyUI's files stack the two
matrices that a feed-forward begins with."""

from __future__ import annotations

from tiltflow.formats.keys import Layout

_BLOCK = "transformer_blocks.{i}."
_NAMES = (
    "img_in",
    "txt_in.text_norm",
    "txt_in.in_layer",
    "txt_in.out_layer",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "modulation.1",
    *(f"{_BLOCK}attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
    f"{_BLOCK}img_mlp.out",
    "norm_out.linear",
    "proj_out",
)

LAYOUT = Layout(
    source="diffusers 0.42 convert_qwen_image21_transformer_checkpoint_to_diffusers and "
    "lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers",
    modules={name: (name,) for name in _NAMES}
    | {f"{_BLOCK}img_mlp.gate_up": (f"{_BLOCK}img_mlp.gate_layer", f"{_BLOCK}img_mlp.proj")},
)
