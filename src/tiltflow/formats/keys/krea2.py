"""Krea 2: the names of the makers' own code (krea-ai/krea-2, Apache-2.0)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from tiltflow.formats.keys import Layout

_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_NORMS = {
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
}
_BLOCKS = {
    "blocks.{i}.": "transformer_blocks.{i}.",
    "txtfusion.layerwise_blocks.{i}.": "text_fusion.layerwise_blocks.{i}.",
    "txtfusion.refiner_blocks.{i}.": "text_fusion.refiner_blocks.{i}.",
}
"""Blocks by the makers' name and diffusers'; inside they are alike."""


def _modules(own: str, here: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, module in _ATTENTION.items():
        yield f"{own}attn.{name}", (f"{here}attn.{module}",)
    for name in ("gate", "up", "down"):
        yield f"{own}mlp.{name}", (f"{here}ff.{name}",)


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers",
    modules={
        "first": ("img_in",),
        "tmlp.0": ("time_embed.linear_1",),
        "tmlp.2": ("time_embed.linear_2",),
        "tproj.1": ("time_mod_proj",),
        "txtmlp.1": ("txt_in.linear_1",),
        "txtmlp.3": ("txt_in.linear_2",),
        "txtfusion.projector": ("text_fusion.projector",),
        "last.linear": ("final_layer.linear",),
        **dict(chain.from_iterable(_modules(own, here) for own, here in _BLOCKS.items())),
    },
    tensors={
        "txtmlp.0.scale": "txt_in.norm.weight",
        "last.norm.scale": "final_layer.norm.weight",
        "last.modulation.lin": "final_layer.scale_shift_table",
        "blocks.{i}.mod.lin": "transformer_blocks.{i}.scale_shift_table",
        **{f"{own}{a}": f"{here}{b}" for own, here in _BLOCKS.items() for a, b in _NORMS.items()},
    },
    flat=frozenset({"transformer_blocks.{i}.scale_shift_table"}),
)
