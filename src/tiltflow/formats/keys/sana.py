"""SANA: the names of the makers' own code (NVlabs/Sana, Apache-2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltflow.formats.keys import Layout

_BLOCK, _OURS = "blocks.{i}.", "transformer_blocks.{i}."
_TIME, _CAPTION = "time_embed.emb.timestep_embedder.", "caption_projection."


def _dropped(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Buffers of the makers' network. Their own loader and diffusers' drop the positions, which
    the published models do not use, and put the empty prompt's embedding in anew (300 tokens)."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        "pos_embed": (1, (config["sample_size"] // config["patch_size"]) ** 2, width),
        "y_embedder.y_embedding": (300, config["caption_channels"]),
    }


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_sana_transformer_to_diffusers; query and key "
    "norms: diffusers' scripts/convert_sana_to_diffusers.py",
    modules={
        "x_embedder.proj": ("patch_embed.proj",),
        "t_embedder.mlp.0": (f"{_TIME}linear_1",),
        "t_embedder.mlp.2": (f"{_TIME}linear_2",),
        "t_block.1": ("time_embed.linear",),
        "y_embedder.y_proj.fc1": (f"{_CAPTION}linear_1",),
        "y_embedder.y_proj.fc2": (f"{_CAPTION}linear_2",),
        "attention_y_norm": ("caption_norm",),
        f"{_BLOCK}attn.qkv": tuple(f"{_OURS}attn1.to_{one}" for one in "qkv"),
        f"{_BLOCK}attn.proj": (f"{_OURS}attn1.to_out.0",),
        f"{_BLOCK}attn.q_norm": (f"{_OURS}attn1.norm_q",),
        f"{_BLOCK}attn.k_norm": (f"{_OURS}attn1.norm_k",),
        f"{_BLOCK}cross_attn.q_linear": (f"{_OURS}attn2.to_q",),
        f"{_BLOCK}cross_attn.kv_linear": (f"{_OURS}attn2.to_k", f"{_OURS}attn2.to_v"),
        f"{_BLOCK}cross_attn.proj": (f"{_OURS}attn2.to_out.0",),
        f"{_BLOCK}cross_attn.q_norm": (f"{_OURS}attn2.norm_q",),
        f"{_BLOCK}cross_attn.k_norm": (f"{_OURS}attn2.norm_k",),
        f"{_BLOCK}mlp.inverted_conv.conv": (f"{_OURS}ff.conv_inverted",),
        f"{_BLOCK}mlp.depth_conv.conv": (f"{_OURS}ff.conv_depth",),
        f"{_BLOCK}mlp.point_conv.conv": (f"{_OURS}ff.conv_point",),
        "final_layer.linear": ("proj_out",),
    },
    tensors={
        f"{_BLOCK}scale_shift_table": f"{_OURS}scale_shift_table",
        "final_layer.scale_shift_table": "scale_shift_table",
    },
    dropped=_dropped,
)
