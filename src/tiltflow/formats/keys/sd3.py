"""Stable Diffusion 3 and 3.5: `mmdit` of the published checkpoints."""

from __future__ import annotations

from tiltflow.formats.keys import Layout

_BLOCK, _JOINT = "transformer_blocks.{i}.", "joint_blocks.{i}."


def _qkv(where: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}{where}.{name}" for name in names)


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers",
    modules={
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "context_embedder": ("context_embedder",),
        f"{_JOINT}x_block.attn.qkv": _qkv("attn", "to_q", "to_k", "to_v"),
        f"{_JOINT}x_block.attn.proj": (f"{_BLOCK}attn.to_out.0",),
        f"{_JOINT}x_block.attn2.qkv": _qkv("attn2", "to_q", "to_k", "to_v"),
        f"{_JOINT}x_block.attn2.proj": (f"{_BLOCK}attn2.to_out.0",),
        f"{_JOINT}x_block.mlp.fc1": (f"{_BLOCK}ff.net.0.proj",),
        f"{_JOINT}x_block.mlp.fc2": (f"{_BLOCK}ff.net.2",),
        f"{_JOINT}x_block.adaLN_modulation.1": (f"{_BLOCK}norm1.linear",),
        f"{_JOINT}context_block.attn.qkv": _qkv("attn", "add_q_proj", "add_k_proj", "add_v_proj"),
        f"{_JOINT}context_block.attn.proj": (f"{_BLOCK}attn.to_add_out",),
        f"{_JOINT}context_block.mlp.fc1": (f"{_BLOCK}ff_context.net.0.proj",),
        f"{_JOINT}context_block.mlp.fc2": (f"{_BLOCK}ff_context.net.2",),
        f"{_JOINT}context_block.adaLN_modulation.1": (f"{_BLOCK}norm1_context.linear",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    tensors={
        "pos_embed": "pos_embed.pos_embed",
        f"{_JOINT}x_block.attn.ln_q.weight": f"{_BLOCK}attn.norm_q.weight",
        f"{_JOINT}x_block.attn.ln_k.weight": f"{_BLOCK}attn.norm_k.weight",
        f"{_JOINT}x_block.attn2.ln_q.weight": f"{_BLOCK}attn2.norm_q.weight",
        f"{_JOINT}x_block.attn2.ln_k.weight": f"{_BLOCK}attn2.norm_k.weight",
        f"{_JOINT}context_block.attn.ln_q.weight": f"{_BLOCK}attn.norm_added_q.weight",
        f"{_JOINT}context_block.attn.ln_k.weight": f"{_BLOCK}attn.norm_added_k.weight",
    },
    swapped=frozenset({"norm_out.linear"}),
    swapped_last=frozenset({f"{_BLOCK}norm1_context.linear"}),
)
