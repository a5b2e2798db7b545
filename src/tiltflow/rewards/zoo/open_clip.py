"""Weights in open_clip's names as a transformers `CLIPModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tiltflow.rewards.weights import from_state

# Buffers and heads that open_clip's and HPSv2's files may hold beside the two towers.
IGNORED = re.compile(r"attn_mask|.*position_ids|logit_bias")

_TOWER = (
    (r"transformer\.resblocks\.(\d+)\.ln_1\.", r"encoder.layers.\1.layer_norm1."),
    (r"transformer\.resblocks\.(\d+)\.ln_2\.", r"encoder.layers.\1.layer_norm2."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.in_proj_"),
)
_VISION = (
    (r"class_embedding$", "embeddings.class_embedding"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"conv1\.weight$", "embeddings.patch_embedding.weight"),
    (r"ln_pre\.", "pre_layrnorm."),  # transformers spells it so
    (r"ln_post\.", "post_layernorm."),
    *_TOWER,
)
_TEXT = (
    (r"token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"ln_final\.", "final_layer_norm."),
    *_TOWER,
)
_WHOLE = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}


def clip_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under `CLIPModel`'s names.

    The attention's joint input projection is split in three, and the projections, which open_clip
    multiplies from the right, are transposed (open_clip's `transformer.py` and `model.py`).

    Raises:
        ValueError: on a key that is none of open_clip's CLIP with vision and text transformers.
    """
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if IGNORED.fullmatch(key):
            continue
        if key in _WHOLE:
            named[_WHOLE[key]] = value.T.contiguous() if value.ndim == 2 else value
            continue
        name = _renamed(key)
        head, joint, kind = name.partition("in_proj_")
        if joint:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                named[f"{head}{part}_proj.{kind}"] = rows.contiguous()
        else:
            named[name] = value
    return named


def _renamed(key: str) -> str:
    vision = key.startswith("visual.")
    table, prefix = (_VISION, "vision_model.") if vision else (_TEXT, "text_model.")
    rest = key.removeprefix("visual.")
    for pattern, replacement in table:
        name, count = re.subn(f"^{pattern}", replacement, rest)
        if count:
            return prefix + name
    raise ValueError(f"{key} is no weight of an open_clip CLIP with two transformers")


def clip_from_open_clip(state: Mapping[str, Tensor], config: CLIPConfig) -> CLIPModel:
    """A `CLIPModel` of this configuration in fp32 with open_clip's weights.

    Raises:
        ValueError: if the weights are not those of such a model.
    """
    model = from_state(CLIPModel, config, clip_keys(state), "the open_clip checkpoint")
    assert isinstance(model, CLIPModel)
    return model
