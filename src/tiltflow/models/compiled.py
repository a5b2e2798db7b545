"""Regional compilation: the repeated blocks of a transformer and nothing else (`model.compile`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch._functorch.config
from torch import nn

VARIANTS = 32
"""Of one block's code: with or without gradient, sizes of a batch, the block's place, and what
adapters are stacked, not which (`low_rank.FusedLinear`). Measured 8 in stage 1 with a fake score
for each of 4 boundaries, 15 in stage 2."""


def compile_blocks(
    network: nn.Module,
    backend: str = "inductor",
    repeated: Sequence[str] = (),
    again: bool = False,
) -> int:
    """Compiles every repeated block of a diffusers transformer in place; how many there were.

    `repeated` are the blocks' classes, where diffusers' own list has none (`Family.blocks`).
    `again`: a pass's graph may be gone back through more than once (`tilt.keep_graph`), so that no
    backward pass may write over what it was given.

    To be called when all adapters are on it. One compilation serves all blocks of a kind under all
    roles with as many adapters. torch's limit on recompilations, which counts for the whole
    process, is raised by `VARIANTS`; past it torch would go on uncompiled in silence, here it
    raises.

    Raises:
        ValueError: if the network names no repeated blocks.
    """
    kind = type(network).__name__
    names = repeated or getattr(network, "_repeated_blocks", None) or ()
    # by their bases too: a block that ranks share (`distributed.shard`) is of a class of its own
    blocks = [m for m in network.modules() if any(k.__name__ in names for k in type(m).__mro__)]
    if not blocks:
        raise ValueError(f"model.compile: a {kind} has no repeated blocks to compile")
    config = torch._dynamo.config
    config.recompile_limit += VARIANTS
    config.accumulated_recompile_limit += 4 * VARIANTS
    config.fail_on_recompile_limit_hit = True
    if again:
        torch._functorch.config.donated_buffer = False
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)
