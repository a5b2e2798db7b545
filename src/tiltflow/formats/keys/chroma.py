"""Chroma: FLUX.1's names, without the modulation that one shared approximator takes the place of
(lodestones/Chroma1-HD, Apache-2.0)."""

from __future__ import annotations

from tiltflow.formats.keys import Layout
from tiltflow.formats.keys.flux import LAYOUT as FLUX

_GONE = ("time_in.", "vector_in.", "guidance_in.", "final_layer.adaLN_modulation.")
_GUIDANCE = "distilled_guidance_layer."


def _kept(original: str) -> bool:
    return (
        not original.startswith(_GONE)
        and "_mod.lin" not in original
        and ("modulation.lin" not in original)
    )


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers",
    modules={
        **{original: parts for original, parts in FLUX.modules.items() if _kept(original)},
        f"{_GUIDANCE}in_proj": (f"{_GUIDANCE}in_proj",),
        f"{_GUIDANCE}out_proj": (f"{_GUIDANCE}out_proj",),
        f"{_GUIDANCE}layers.{{i}}.in_layer": (f"{_GUIDANCE}layers.{{i}}.linear_1",),
        f"{_GUIDANCE}layers.{{i}}.out_layer": (f"{_GUIDANCE}layers.{{i}}.linear_2",),
    },
    tensors={**FLUX.tensors, f"{_GUIDANCE}norms.{{i}}.scale": f"{_GUIDANCE}norms.{{i}}.weight"},
)
