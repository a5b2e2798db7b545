"""What numbers a pipeline's configurations may hold, so that nothing is built from nonsense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHOLE = {
    "patch_size": (1, 64),
    "in_channels": (1, 65_536),
    "out_channels": (1, 65_536),
    "latent_channels": (1, 65_536),
    "block_out_channels": (1, 65_536),
    "decoder_block_out_channels": (1, 65_536),
    "norm_num_groups": (1, 65_536),
    "layers_per_block": (1, 1_000),
    "num_layers": (0, 1_000),
    "num_single_layers": (0, 1_000),
    "num_hidden_layers": (1, 1_000),
    "dual_attention_layers": (0, 1_000),
    "num_attention_heads": (1, 4_096),
    "num_key_value_heads": (1, 4_096),
    "num_heads": (1, 4_096),
    "attention_head_dim": (1, 65_536),
    "head_dim": (1, 65_536),
    "axes_dims_rope": (0, 65_536),
    "d_kv": (1, 65_536),
    "d_model": (1, 1_000_000),
    "d_ff": (1, 1_000_000),
    "hidden_size": (1, 1_000_000),
    "intermediate_size": (1, 1_000_000),
    "joint_attention_dim": (1, 1_000_000),
    "caption_projection_dim": (1, 1_000_000),
    "pooled_projection_dim": (1, 1_000_000),
    "projection_dim": (1, 1_000_000),
    "timestep_guidance_channels": (1, 65_536),
    "vocab_size": (1, 10_000_000),
    "max_position_embeddings": (1, 10_000_000),
    "relative_attention_num_buckets": (1, 65_536),
    "relative_attention_max_distance": (1, 1_000_000),
    "sample_size": (1, 16_384),
    "pos_embed_max_size": (1, 4_096),
    "num_train_timesteps": (1, 1_000_000),
    "base_image_seq_len": (0, 100_000_000),
    "max_image_seq_len": (1, 100_000_000),
    "max_sequence_length": (0, 100_000),
}
"""The lowest and the highest: far beyond what was ever published, and no more than a machine holds.
The weights' headers narrow most of them further."""

REAL = {
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
    "batch_norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0),
    "rms_norm_eps": (0.0, 1.0),
    "eps": (0.0, 1.0),
    "mlp_ratio": (1e-3, 1e3),
    "norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
    "t_scale": (1e-3, 1e6),
    "shift": (1e-6, 1e6),
    "flow_shift": (1e-6, 1e6),
    "timestep_scale": (1e-6, 1e6),
    "base_shift": (-1e3, 1e3),
    "max_shift": (-1e3, 1e3),
    "shift_terminal": (0.0, 0.999_999),
    "guidance": (0.0, 1e4),
}

FLAGS = (
    "guidance_embeds", "tie_word_embeddings", "use_quant_conv", "use_post_quant_conv",
    "mid_block_add_attention", "is_distilled", "use_dynamic_shifting", "invert_sigmas",
    "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip

COUNTED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Flags that diffusers adds up, so that null is none of them."""

CHOICES = {"time_shift_type": ("exponential", "linear")}

LISTS = ("block_out_channels", "decoder_block_out_channels", "axes_dims_rope")
"""Always several numbers; `EITHER` may be one number or several."""
EITHER = ("patch_size", "dual_attention_layers")
ONE = {*WHOLE} - {*LISTS, *EITHER}
"""Never a list. What only one family has (`Family.whole`) may be either."""
LONGEST = 1_000
"""Numbers in a list."""

NULLABLE = (
    "out_channels", "decoder_block_out_channels", "shift_factor", "shift_terminal", "head_dim",
    "num_key_value_heads", "sample_size", "tie_word_embeddings", "pos_embed_max_size",
    "base_shift", "max_shift",
)  # fmt: skip
"""What may be null: a class's default, a formula, or what a later check has a sentence for."""


NESTED = ("text_config", "vision_config")
"""Configurations inside one: of a model that has both a language model and an eye."""


def flattened(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A configuration, and those inside it."""
    inner = (config[key] for key in NESTED if isinstance(config.get(key), dict))
    return [config, *inner]


def check_numbers(
    file: Path,
    config: Mapping[str, Any],
    more: Mapping[str, tuple[int, int]] | None = None,
    nullable: tuple[str, ...] = (),
) -> None:
    """Whether every number, flag and choice that is known by name is within its bounds.

    `more` are whole numbers beside those of `WHOLE`, which stay as they are; `nullable` may be
    null beside those of `NULLABLE`.

    Raises:
        ValueError: naming the file, the key, its value and the bounds.
    """
    whole = {**(more or {}), **WHOLE}
    for key, value in config.items():
        if value is None and (
            key in (*NULLABLE, *nullable) or key not in {*whole, *REAL, *COUNTED}
        ):
            continue
        said = f"{file} has {key}={shown(value)}, which is"
        if key in whole:
            _check_whole(said, key, value, *whole[key])
        elif key in REAL:
            low, high = REAL[key]
            if not is_number(value) or not low <= value <= high:
                raise ValueError(f"{said} no number from {low:g} to {high:g}")
        elif key in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{said} neither true nor false")
        elif key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{said} none of {', '.join(CHOICES[key])}")


def _check_whole(said: str, key: str, value: Any, low: int, high: int) -> None:
    if key in LISTS or (key not in ONE and isinstance(value, list)):
        if not isinstance(value, list) or len(value) > LONGEST or (key in LISTS and not value):
            raise ValueError(f"{said} no list of 1 to {LONGEST} whole numbers")
        numbers, what = value, f"no list of whole numbers from {low} to {high}"
    else:
        numbers, what = [value], f"no whole number from {low} to {high}"
    if not all(is_whole(number) and low <= number <= high for number in numbers):
        raise ValueError(f"{said} {what}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; one of hundreds of digits is none."""
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value as a sentence shows it: not longer than 40 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."
