"""FLUX.2 and its klein: the names of the makers' own code (black-forest-labs/flux2, Apache-2.0)."""

from __future__ import annotations

from tiltflow.formats.keys import Layout
from tiltflow.formats.keys.flux import LAYOUT as FLUX

_BLOCK, _DOUBLE = "transformer_blocks.{i}.", "double_blocks.{i}."
_SINGLE_BLOCK, _SINGLE = "single_transformer_blocks.{i}.", "single_blocks.{i}."
_AS_FLUX_1 = (
    "img_in",
    "txt_in",
    *(f"{_DOUBLE}{stream}_attn.{part}" for stream in ("img", "txt") for part in ("qkv", "proj")),
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers",
    modules={
        **{original: FLUX.modules[original] for original in _AS_FLUX_1},
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        f"{_DOUBLE}img_mlp.0": (f"{_BLOCK}ff.linear_in",),
        f"{_DOUBLE}img_mlp.2": (f"{_BLOCK}ff.linear_out",),
        f"{_DOUBLE}txt_mlp.0": (f"{_BLOCK}ff_context.linear_in",),
        f"{_DOUBLE}txt_mlp.2": (f"{_BLOCK}ff_context.linear_out",),
        f"{_SINGLE}linear1": (f"{_SINGLE_BLOCK}attn.to_qkv_mlp_proj",),
        f"{_SINGLE}linear2": (f"{_SINGLE_BLOCK}attn.to_out",),
    },
    tensors=FLUX.tensors,
    swapped=FLUX.swapped,
)
