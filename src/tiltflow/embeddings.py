"""Every prompt encoded once, before training (DESIGN §1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tiltflow.backbones.base import Backbone, Conditioning, join
from tiltflow.prompts import Prompt


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and their conditioning. The negative prompt is the same for all: one row."""

    prompts: tuple[Prompt, ...]
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.prompts)

    def select(
        self, indices: Sequence[int], device: torch.device
    ) -> tuple[Conditioning, list[Prompt]]:
        """Conditioning and prompts of some rows, in the order given."""
        rows = torch.as_tensor(list(indices))
        positive = {key: value[rows].to(device) for key, value in self.cond.positive.items()}
        negative = {
            key: value.to(device).expand(len(rows), *value.shape[1:])
            for key, value in self.cond.negative.items()
        }
        return Conditioning(positive, negative), [self.prompts[i] for i in indices]


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> EncodedPrompts:
    """Encodes each distinct text once; the result lies in main memory (CPU).

    Raises:
        ValueError: if there is no prompt.
    """
    if not prompts:
        raise ValueError("there are no prompts to encode")
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    parts = []
    for start in range(0, len(texts), batch_size):
        parts.append(backbone.encode(texts[start : start + batch_size]).to("cpu"))
        progress(min(start + batch_size, len(texts)))
    table = join(parts)
    row = {text: i for i, text in enumerate(texts)}
    rows = torch.tensor([row[prompt.text] for prompt in prompts])
    positive = {key: value[rows] for key, value in table.positive.items()}
    negative = {key: value[:1] for key, value in table.negative.items()}
    return EncodedPrompts(tuple(prompts), Conditioning(positive, negative))
