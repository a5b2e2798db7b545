"""Prompts of unequal lengths as one tensor: rows filled up with zeros, and where each ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiltflow.core.transfer import to_device


def filled(rows: Sequence[Tensor], sequence: int) -> dict[str, Tensor]:
    """Embeddings (L_i, …) as a conditioning: `prompt_embeds` (B, sequence, …), and
    `prompt_lengths` (B,), which stays in main memory."""
    embeds = rows[0].new_zeros(len(rows), sequence, *rows[0].shape[1:])
    for place, row in zip(embeds, rows, strict=True):
        place[: len(row)] = row
    return {"prompt_embeds": embeds, "prompt_lengths": torch.tensor([len(row) for row in rows])}


def cut(cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The inverse for a network that takes a batch: embeddings (B, longest, …) and which of them
    are the prompt's, (B, longest) bool, or None where all are. On the meta device every prompt is
    as long as it can be."""
    embeds, lengths = cond["prompt_embeds"], cond["prompt_lengths"]
    if lengths.is_meta:
        return embeds, None
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    return embeds[:, :longest], None if mask.all() else to_device(mask, embeds.device)
