"""What a transformer's frozen weights are kept in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tiltflow.models.pipelines.weights import largest

FP8 = torch.float8_e4m3fn
"""What `model.base_storage=fp8` keeps matrices in: 1 + 4 + 3 bits."""
LOST = 0.2
"""The share of a matrix that rounding may take before it is said: a usual one loses .03."""
ROWS = 64
"""Of a matrix, that this is measured on."""


def keep_in_fp8(network: nn.Module, dtype: torch.dtype, where: str) -> dict[str, float]:
    """Rounds a transformer's matrices to 8-bit floats, each cast to `dtype` for its own product.

    Norms and what belongs to them stay as they are, and convolutions, because a graph keeps their
    weight itself and not a view of what it was cast to. This is diffusers' layerwise casting: it
    swaps the parameter for the product's duration, and a graph keeps the cast matrix, so without
    gradient checkpointing it saves nothing in a backward pass. Adapters go on afterwards.

    Gives the matrices that lose more than `LOST`, with the share of their norm: below 1/64 the
    steps of 8 bits are no longer in proportion, and below 1/1024 a value is 0.

    Raises:
        ValueError: if a value is beyond what 8 bits hold; torch would clip it, or make it NaN.
    """
    there = {n: p for n, p in network.named_parameters() if not p.is_meta}
    before = {n: largest(p) for n, p in there.items()}
    lost = lost_in_fp8({n: p for n, p in there.items() if p.ndim == 2})
    network.enable_layerwise_casting(  # type: ignore[operator]
        storage_dtype=FP8, compute_dtype=dtype, skip_modules_classes=(nn.Conv2d,)
    )
    most = torch.finfo(FP8).max
    for name, parameter in network.named_parameters():
        if parameter.dtype == FP8 and before.get(name, 0.0) > most:
            raise ValueError(
                f"the transformer in {where} has a value of {before[name]:g} in {name}, and 8 "
                f"bits reach to {most:g}: leave model.base_storage unset"
            )
    kept = {n for n, p in network.named_parameters() if p.dtype == FP8}
    return {n: share for n, share in lost.items() if n in kept}


def lost_in_fp8(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """Those of which rounding to 8 bits takes more than `LOST`, with the share of their norm."""
    shares = {name: _lost(matrix) for name, matrix in matrices.items()}
    return {name: share for name, share in shares.items() if share > LOST}


@torch.no_grad()
def _lost(matrix: Tensor) -> float:
    """The norm of what rounding to 8 bits takes away, as a share of the norm."""
    some = matrix[:: -(-len(matrix) // ROWS)].float()
    norm = float(some.norm())
    return float((some - some.to(FP8).float()).norm()) / norm if norm else 0.0


def lost_notices(lost: Mapping[str, float]) -> list[str]:
    """A line where matrices are no longer what they were in 8 bits."""
    return [
        f"model.base_storage=fp8 {what}: the teacher is another model (leave it unset)"
        for what in taken(lost)
    ]


def taken(lost: Mapping[str, float]) -> list[str]:
    """What `lost_in_fp8` found, in words, if it found anything."""
    if not lost:
        return []
    worst = max(lost, key=lambda name: lost[name])
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return [f"takes {lost[worst]:.0%} of {worst}{more}, whose values are too small for 8 bits"]


def input_dtype(network: nn.Module, module: str = "context_embedder") -> torch.dtype:
    """The precision of a transformer's frozen weights, which its inputs are given in; `module` is
    one that takes an input.

    Not `network.dtype`: that is of whatever parameter comes first, be it an adapter's. It is right
    where weights are kept in 8 bits: what they are cast to.
    """
    weight = network.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    if weight.dtype == FP8:
        computed = network.dtype
        assert isinstance(computed, torch.dtype)
        return computed
    return weight.dtype
