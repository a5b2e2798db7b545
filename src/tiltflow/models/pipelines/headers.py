"""What safetensors headers say, and whether a part's configuration goes with it.

Headers are read and no tensor is: a configuration of a million layers, or of a width that would
fill the memory, is refused before anything is built from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

FLOATS = ("F64", "F32", "F16", "BF16")
"""What weights may be stored in."""

SCALE = re.compile(
    r"(^|.*[._])(weight_scale(_inv|_2)?|scale_weight|scale_input|input_scale|scaled_fp8|absmax"
    r"|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|scales)"
)
"""Names that quantised weights come with: scales, tables and packed numbers."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: its shape, and its type as safetensors calls it."""

    shape: tuple[int, ...]
    dtype: str


def header(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name. The header has to describe the file to its last byte.

    Raises:
        ValueError: if it does not: the file is torn, or of another format.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118
                one = opened.get_slice(name)
                found[name] = Entry(tuple(one.get_shape()), one.get_dtype())
            return found
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is torn or no safetensors file ({error})") from error


def header_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name.

    Raises:
        ValueError: as `header`.
    """
    return {name: entry.shape for name, entry in header(file).items()}


def part_header(folder: Path, files: Sequence[str], listed: Mapping[str, str]) -> dict[str, Entry]:
    """The tensors of a part's files together; `listed` is the map of its index, if there is one.

    Raises:
        ValueError: if a file is torn, a tensor stands in two files, the index and the files do not
            agree, or weights are quantised: their scales would not be applied.
    """
    found: dict[str, Entry] = {}
    places: dict[str, str] = {}
    for file in files:
        for name, entry in header(folder / file).items():
            if name in places:
                raise ValueError(f"{folder} has {name} twice, in {places[name]} and in {file}")
            places[name], found[name] = file, entry
    for name in sorted(set(listed) | (set(places) if listed else set())):
        if listed.get(name) != places.get(name):
            said, here = listed.get(name, "no file"), places.get(name, "no file")
            raise ValueError(f"the index of {folder} has {name} in {said}, but it is in {here}")
    for name in sorted(found):
        if SCALE.fullmatch(name):
            raise ValueError(
                f"{folder} holds quantised weights with scales of their own ({name}), which are "
                "not applied here: give the model in fp32, bf16 or fp16"
            )
    for name in sorted(found):
        if found[name].dtype.startswith("F") and found[name].dtype not in FLOATS:
            raise ValueError(
                f"{folder} holds {name} in {found[name].dtype}, which is quantised: give the "
                "model in fp32, bf16 or fp16"
            )
    return found


def check_sizes(
    folder: Path,
    config: Mapping[str, Any],
    found: Mapping[str, Entry],
    depths: Sequence[str] = DEPTHS,
    widths: Sequence[str] = WIDTHS,
) -> None:
    """Whether the depths and widths of a part's configuration are those of its weights.

    Raises:
        ValueError: if a size is no size of the weights.
    """
    sizes = {size for entry in found.values() for size in entry.shape}
    for key in depths:
        depth = config.get(key, 0)
        if not isinstance(depth, int) or depth > len(found):
            raise ValueError(f"{folder} has {len(found)} weights, but {key} is {depth!r}")
    given: dict[str, Any] = {key: config[key] for key in widths if config.get(key) is not None}
    heads, each = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(each, int):
        given["num_attention_heads × attention_head_dim"] = heads * each
    for key, value in given.items():
        for width in value if isinstance(value, list) else [value]:
            if width not in sizes:
                raise ValueError(f"{folder} has no weight of the size {key}={width!r}")
