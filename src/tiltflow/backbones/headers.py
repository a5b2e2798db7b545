"""What safetensors headers say, and whether a part's configuration goes with it.

Headers are read and no tensor is: a configuration of a million layers, or of a width that would
fill the memory, is refused before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "layers_per_block")
"""Numbers of layers: each layer has weights of its own."""

WIDTHS = (
    "hidden_size", "intermediate_size", "d_model", "d_ff", "vocab_size", "joint_attention_dim",
    "pooled_projection_dim", "caption_projection_dim", "block_out_channels",
)  # fmt: skip
"""Sizes that some weight has along some dimension. One that is unset is the class's default."""


def header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name. The header has to describe the file to its last byte.

    Raises:
        ValueError: if it does not: the file is torn, or of another format.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {
                name: tuple(opened.get_slice(name).get_shape())
                for name in opened.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is torn or no safetensors file ({error})") from error


def check_sizes(folder: Path, config: Mapping[str, Any], files: Sequence[str]) -> None:
    """Whether the depths and widths of a part's configuration are those of its weights.

    Raises:
        ValueError: if a file is torn, or a size is no size of the weights.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        shapes |= header_shapes(folder / name)
    sizes = {size for shape in shapes.values() for size in shape}
    for key in DEPTHS:
        depth = config.get(key, 0)
        if not isinstance(depth, int) or depth > len(shapes):
            raise ValueError(f"{folder} has {len(shapes)} weights, but {key} is {depth!r}")
    widths: dict[str, Any] = {key: config[key] for key in WIDTHS if config.get(key) is not None}
    heads, each = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(each, int):
        widths["num_attention_heads × attention_head_dim"] = heads * each
    for key, value in widths.items():
        for width in value if isinstance(value, list) else [value]:
            if width not in sizes:
                raise ValueError(f"{folder} has no weight of the size {key}={width!r}")
