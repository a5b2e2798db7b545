"""FLUX.2 and its klein: the names of the makers' own code (black-forest-labs/flux2, Apache-2.0)."""

from __future__ import annotations

from tiltflow.formats.keys import Layout

_BLOCK, _DOUBLE = "transformer_blocks.{i}.", "double_blocks.{i}."
_SINGLE_BLOCK, _SINGLE = "single_transformer_blocks.{i}.", "single_blocks.{i}."


def _attn(*names: str) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}attn.{name}" for name in names)


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers",
    modules={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        f"{_DOUBLE}img_attn.qkv": _attn("to_q", "to_k", "to_v"),
        f"{_DOUBLE}img_attn.proj": _attn("to_out.0"),
        f"{_DOUBLE}txt_attn.qkv": _attn("add_q_proj", "add_k_proj", "add_v_proj"),
        f"{_DOUBLE}txt_attn.proj": _attn("to_add_out"),
        f"{_DOUBLE}img_mlp.0": (f"{_BLOCK}ff.linear_in",),
        f"{_DOUBLE}img_mlp.2": (f"{_BLOCK}ff.linear_out",),
        f"{_DOUBLE}txt_mlp.0": (f"{_BLOCK}ff_context.linear_in",),
        f"{_DOUBLE}txt_mlp.2": (f"{_BLOCK}ff_context.linear_out",),
        f"{_SINGLE}linear1": (f"{_SINGLE_BLOCK}attn.to_qkv_mlp_proj",),
        f"{_SINGLE}linear2": (f"{_SINGLE_BLOCK}attn.to_out",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    tensors={
        f"{_DOUBLE}img_attn.norm.query_norm.scale": f"{_BLOCK}attn.norm_q.weight",
        f"{_DOUBLE}img_attn.norm.key_norm.scale": f"{_BLOCK}attn.norm_k.weight",
        f"{_DOUBLE}txt_attn.norm.query_norm.scale": f"{_BLOCK}attn.norm_added_q.weight",
        f"{_DOUBLE}txt_attn.norm.key_norm.scale": f"{_BLOCK}attn.norm_added_k.weight",
        f"{_SINGLE}norm.query_norm.scale": f"{_SINGLE_BLOCK}attn.norm_q.weight",
        f"{_SINGLE}norm.key_norm.scale": f"{_SINGLE_BLOCK}attn.norm_k.weight",
    },
    swapped=frozenset({"norm_out.linear"}),
)
