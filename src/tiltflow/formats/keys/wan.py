"""Wan 2.1: the names of the makers' own code (Wan-Video/Wan2.1, Apache-2.0)."""

from __future__ import annotations

from tiltflow.formats.keys import Layout

_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PARTS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_wan_transformer_to_diffusers",
    modules={
        "patch_embedding": ("patch_embedding",),
        "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
        "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
        "time_projection.1": ("condition_embedder.time_proj",),
        "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
        "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
        "head.head": ("proj_out",),
        "blocks.{i}.ffn.0": ("blocks.{i}.ffn.net.0.proj",),
        "blocks.{i}.ffn.2": ("blocks.{i}.ffn.net.2",),
        # The makers count the norms in the order they were thought of, diffusers as they are used.
        "blocks.{i}.norm3": ("blocks.{i}.norm2",),
        **{
            f"blocks.{{i}}.{own}.{name}": (f"blocks.{{i}}.{here}.{module}",)
            for own, here in _ATTENTIONS.items()
            for name, module in _PARTS.items()
        },
    },
    tensors={
        "head.modulation": "scale_shift_table",
        "blocks.{i}.modulation": "blocks.{i}.scale_shift_table",
    },
)
