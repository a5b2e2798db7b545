"""Every prompt encoded once, before training (DESIGN §1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.transfer import to_device
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import ON_HOST, Backbone, Conditioning

BATCH = 64
"""Texts that go through the text encoders at a time."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and where their conditioning stands: rows of tables in main memory or on disk.

    `places[i]` are the table and the row of prompt i. Each of `tables` has a row a text in
    `positive` and one row in `negative`, the empty prompt's, which is the same in all of them.
    """

    prompts: tuple[Prompt, ...]
    tables: tuple[Conditioning, ...]
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def select(
        self, indices: Sequence[int], device: torch.device
    ) -> tuple[Conditioning, list[Prompt]]:
        """Conditioning and prompts of some rows, in the order given."""
        places = [self.places[i] for i in indices]
        first = self.tables[0]

        def placed(key: str, value: Tensor) -> Tensor:
            return value if key.endswith(ON_HOST) else to_device(value, device)

        positive = {
            key: placed(key, torch.stack([self.tables[t].positive[key][row] for t, row in places]))
            for key in first.positive
        }
        negative = {
            key: placed(key, value).expand(len(places), *value.shape[1:])
            for key, value in first.negative.items()
        }
        return Conditioning(positive, negative), [self.prompts[i] for i in indices]


def distinct(prompts: Sequence[Prompt]) -> list[str]:
    """The texts of prompts, each once, in order."""
    return list(dict.fromkeys(prompt.text for prompt in prompts))


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    batch_size: int = BATCH,
    progress: Progress = lambda done: None,
) -> EncodedPrompts:
    """Encodes each distinct text once; the result lies in main memory (CPU).

    Raises:
        ValueError: if there is no prompt.
    """
    if not prompts:
        raise ValueError("there are no prompts to encode")
    texts = distinct(prompts)
    tables = []
    for part in encoded_batches(backbone, texts, batch_size):
        tables.append(part)
        progress(min(len(tables) * batch_size, len(texts)))
    places = {text: divmod(i, batch_size) for i, text in enumerate(texts)}
    return EncodedPrompts(tuple(prompts), tuple(tables), tuple(places[p.text] for p in prompts))


def encoded_batches(
    backbone: Backbone, texts: Sequence[str], batch_size: int
) -> Iterator[Conditioning]:
    """Tables (on the CPU) of `batch_size` texts at a time, the last one of what is left.

    Exactly `batch_size` texts go through the encoders each time, the last batch filled up with the
    empty prompt: a matrix product rounds by its size, so a text's embedding is the same bits
    whatever else is encoded with it, and a cache may mix old and new ones. Where a batch would
    be as long as its longest text (`ragged`), each goes alone.
    """
    alone = getattr(backbone, "ragged", False)
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        if alone:
            cond = _joined([backbone.encode([text]) for text in part])
        else:
            cond = backbone.encode([*part, *[""] * (batch_size - len(part))])
        yield Conditioning(
            {key: value[: len(part)].to("cpu") for key, value in cond.positive.items()},
            {key: value[:1].to("cpu") for key, value in cond.negative.items()},
        )


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    """One after the other, with the first one's negative, which is alike in all."""
    positive = {key: torch.cat([one.positive[key] for one in parts]) for key in parts[0].positive}
    return Conditioning(positive, parts[0].negative)
