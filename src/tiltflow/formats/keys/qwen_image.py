"""Qwen-Image: the makers published it in diffusers' layout, which is the original one
(Qwen/Qwen-Image, Apache-2.0)."""

from __future__ import annotations

from tiltflow.formats.keys import Layout

_BLOCK = "transformer_blocks.{i}."
_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "norm_q", "norm_k", "norm_added_q", "norm_added_k",
)  # fmt: skip
_NAMES = (
    "img_in",
    "txt_in",
    "txt_norm",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    *(f"{_BLOCK}attn.{name}" for name in _ATTENTION),
    *(
        f"{_BLOCK}{one}_{rest}"
        for one in ("img", "txt")
        for rest in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
    ),
    "norm_out.linear",
    "proj_out",
)

LAYOUT = Layout(
    source="diffusers 0.42 single_file_model (the converter of QwenImageTransformer2DModel changes "
    "nothing) and lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers",
    modules={name: (name,) for name in _NAMES},
)
