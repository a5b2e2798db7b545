"""The names that a family's transformer has in the files of its makers, which other programs read.

diffusers renames modules, splits fused matrices and exchanges the halves of some. One file a family
says how, as data; the functions here turn a state dict or a LoRA into the makers' layout, exactly.
Every map is the inverse of diffusers' own converter (Apache-2.0), which is also its test.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INDEX = "{i}"
"""A block's number in a name of a `Layout`."""


@dataclass(frozen=True)
class Layout:
    """How diffusers' names correspond to the original ones.

    `modules` has, by original module, the diffusers modules whose rows it stacks; `tensors` has
    single tensors that are no module's weight or bias. `swapped` are diffusers modules whose two
    halves of rows (scale, shift) stand the other way round in the original, `swapped_last` those
    of which it is true in the last block alone; `flat` are tensors that the original has as one
    row. `dropped` are the shapes, by the transformer's configuration, of original tensors that
    diffusers' network has not: readers want them there and take nothing from them. `source` is
    where the facts are from.
    """

    source: str
    modules: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, str] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()
    swapped_last: frozenset[str] = frozenset()
    dropped: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]] = lambda config: {}
    flat: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pair:
    """A LoRA of one original module: A (r, in), B (out, r), with α = r."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class _Place:
    """A diffusers module in the original layout: it is among the `parts` that `module` stacks."""

    module: str
    parts: tuple[str, ...]
    swapped: bool


def layout_of(family: str) -> Layout:
    """The layout of a family: `LAYOUT` in the module here that has its name.

    Raises:
        ValueError: if there is none.
    """
    if not has_layout(family):
        raise ValueError(
            f"there is no map to the original names of family {family}, which ComfyUI and kohya's "
            "scripts read: take --for diffusers, peft or merged"
        )
    layout = importlib.import_module(f"{__name__}.{family}").LAYOUT
    assert isinstance(layout, Layout)
    return layout


def has_layout(family: str) -> bool:
    """Whether the original names of a family are known."""
    return family.isidentifier() and find_spec(f"{__name__}.{family}") is not None


def original_lora(
    weights: Mapping[str, Tensor], layout: Layout, rows: Mapping[str, int]
) -> dict[str, Pair]:
    """A LoRA with α = rank in original modules: the same matrix products.

    A LoRA of several modules that the original stacks is block-diagonal: As are stacked, each B
    keeps its own rows and columns, so that the rank is the sum of theirs.

    Args:
        weights: `MODULE.lora_A.weight` (r, in) and `MODULE.lora_B.weight` (out, r) by diffusers
            module.
        rows: how many rows each module of the transformer has.

    Raises:
        ValueError: if a module has no original name, or is no linear layer.
    """
    adapted = [name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name]
    last = _last(rows)
    made: dict[str, Pair] = {}
    for name in adapted:
        place = _place(name, layout, last)
        if place.module in made:
            continue
        parts = [part for part in place.parts if part in adapted]
        downs = [weights[f"{part}.lora_A.weight"] for part in parts]
        ups = [weights[f"{part}.lora_B.weight"] for part in parts]
        if any(w.ndim != 2 for w in (*downs, *ups)):
            raise ValueError(f"the adapter on {name} is of no linear layer, which has no such name")
        if place.swapped:
            ups = [_halves_exchanged(up) for up in ups]
        made[place.module] = Pair(torch.cat(downs), _block_diagonal(ups, parts, place.parts, rows))
    return made


def _block_diagonal(
    ups: list[Tensor], parts: list[str], stacked: tuple[str, ...], rows: Mapping[str, int]
) -> Tensor:
    """Bs in the rows of their modules and the columns of their own As; zero elsewhere."""
    if len(stacked) == 1:
        return ups[0]
    whole = ups[0].new_zeros(sum(rows[name] for name in stacked), sum(up.shape[1] for up in ups))
    column = 0
    for part, up in zip(parts, ups, strict=True):
        first = sum(rows[name] for name in stacked[: stacked.index(part)])
        whole[first : first + len(up), column : column + up.shape[1]] = up
        column += up.shape[1]
    return whole


def original_state(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A transformer's whole state dict in the original layout; `state` is emptied on the way.

    Raises:
        ValueError: if a tensor has no original name, or a stacked one is not whole.
    """
    singles = {diffusers: original for original, diffusers in layout.tensors.items()}
    last = _last(state)
    made: dict[str, Tensor] = {}
    for name in list(state):
        if name not in state:
            continue  # stacked into another one already
        pattern, number = _numbered(name)
        if pattern in singles:
            value = state.pop(name)
            flat = pattern in layout.flat
            made[singles[pattern].replace(INDEX, number)] = value.flatten() if flat else value
            continue
        module, _, kind = name.rpartition(".")
        place = _place(module, layout, last)
        missing = [part for part in place.parts if f"{part}.{kind}" not in state]
        if missing:
            raise ValueError(f"the transformer has {name}, but no {missing[0]}.{kind} beside it")
        tensors = [state.pop(f"{part}.{kind}") for part in place.parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        made[f"{place.module}.{kind}"] = _halves_exchanged(whole) if place.swapped else whole
    return made


def in_block(name: str) -> bool:
    """Whether a diffusers name is of something in a numbered block."""
    return re.match(r"\w*(blocks|layers|refiner)\.\d+\.", name) is not None


def _place(name: str, layout: Layout, last: str) -> _Place:
    pattern, number = _numbered(name)
    for original, parts in layout.modules.items():
        if pattern in parts:
            swapped = pattern in layout.swapped
            swapped |= pattern in layout.swapped_last and number == last
            here = tuple(part.replace(INDEX, number) for part in parts)
            return _Place(original.replace(INDEX, number), here, swapped)
    raise ValueError(f"{name} has no name in the original layout of this family")


def _numbered(name: str) -> tuple[str, str]:
    """A name with its block's number taken out, and the number."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    if found is None:
        return name, ""
    return name[: found.start()] + INDEX + name[found.end() :], found[0]


def _last(names: Mapping[str, object]) -> str:
    """The number of the last of `transformer_blocks`."""
    numbers = [int(n.split(".")[1]) for n in names if n.startswith("transformer_blocks.")]
    return str(max(numbers, default=-1))


def _halves_exchanged(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])
