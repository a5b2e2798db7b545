"""Regional compilation: the repeated blocks of a transformer and nothing else (`model.compile`)."""

from __future__ import annotations

import torch
from torch import nn

# Diffusers' own list of these classes is empty.
REPEATED = {"SD3Transformer2DModel": ("JointTransformerBlock",)}
VARIANTS = 16
"""Of one block's code for each set of weights: with or without gradient, sizes of a batch, block's
place. Measured 5: 35 in all for the 7 of stage 1 with a fake score for each of 4 boundaries."""


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compiles every repeated block of a diffusers transformer in place; how many there were.

    To be called when all adapters are on it. One compilation serves all blocks of a kind, and
    each role, whose adapters differ, has its own: torch's limit on recompilations, which counts
    for the whole process, is raised by `VARIANTS` for each. Past it torch would go on uncompiled
    in silence; here it raises.

    Raises:
        ValueError: if the network names no repeated blocks.
    """
    kind = type(network).__name__
    repeated = REPEATED.get(kind) or getattr(network, "_repeated_blocks", None)
    blocks = [m for m in network.modules() if type(m).__name__ in (repeated or ())]
    if not blocks:
        raise ValueError(f"model.compile: a {kind} has no repeated blocks to compile")
    more = VARIANTS * (1 + len(getattr(network, "peft_config", {})))
    config = torch._dynamo.config
    config.recompile_limit += more
    config.accumulated_recompile_limit += 4 * more
    config.fail_on_recompile_limit_hit = True
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)
