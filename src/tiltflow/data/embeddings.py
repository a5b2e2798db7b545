"""Every prompt encoded once, before training (DESIGN §1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.transfer import to_device
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import ON_HOST, Backbone, Conditioning

BATCH = 64
"""Texts that go through the text encoders at a time."""

Progress = Callable[[int], None]
Place = tuple[int, int]
"""A table and a row of it."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and where their conditioning stands: rows of tables in main memory or on disk.

    `places[i]` are the table and the row of prompt i. Each of `tables` has a row a text in
    `positive` and one row in `negative`, the empty prompt's, which is the same in all of them.
    `negatives[i]` are the table and the row of prompt i's own negative prompt, if it has one.
    """

    prompts: tuple[Prompt, ...]
    tables: tuple[Conditioning, ...]
    places: tuple[Place, ...]
    negatives: tuple[Place | None, ...] = ()

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        tables: tuple[Conditioning, ...],
        places: Mapping[str, Place],
    ) -> EncodedPrompts:
        """Of prompts whose texts, and negative texts, stand at these places."""
        own = any(prompt.negative for prompt in prompts)
        negatives = [places[p.negative] if p.negative else None for p in prompts] if own else []
        return cls(tuple(prompts), tables, tuple(places[p.text] for p in prompts), tuple(negatives))

    def __len__(self) -> int:
        return len(self.prompts)

    def select(
        self, indices: Sequence[int], device: torch.device
    ) -> tuple[Conditioning, list[Prompt]]:
        """Conditioning and prompts of some rows, in the order given."""
        first = self.tables[0]

        def placed(key: str, value: Tensor) -> Tensor:
            return value if key.endswith(ON_HOST) else to_device(value, device)

        def stacked(places: Sequence[Place | None]) -> dict[str, Tensor]:
            # A batch has a prompt many times: each is looked up once.
            at = {place: row for row, place in enumerate(dict.fromkeys(places))}
            rows = torch.tensor([at[place] for place in places])

            def batch(key: str) -> Tensor:
                each = torch.stack(
                    [
                        first.negative[key][0]
                        if p is None
                        else self.tables[p[0]].positive[key][p[1]]
                        for p in at
                    ]
                )
                return each if len(at) == len(places) else each[rows]

            return {key: placed(key, batch(key)) for key in first.positive}

        positive = stacked([self.places[i] for i in indices])
        if self.negatives:
            negative = stacked([self.negatives[i] for i in indices])
        else:
            negative = {
                key: placed(key, value).expand(len(indices), *value.shape[1:])
                for key, value in first.negative.items()
            }
        return Conditioning(positive, negative), [self.prompts[i] for i in indices]


def distinct(prompts: Sequence[Prompt]) -> list[str]:
    """The texts of prompts, each once, in order, and then those of their negative prompts."""
    negatives = [prompt.negative for prompt in prompts if prompt.negative]
    return list(dict.fromkeys([*(prompt.text for prompt in prompts), *negatives]))


def check_negatives(prompts: Sequence[Prompt], backbone: Backbone, guidance: float | None) -> None:
    """Passes prompts without negative ones of their own, or whose teacher is guided away from them.

    Raises:
        ValueError: if there are some and the teacher has no pass without the prompt, or the family
            does not encode them as it encodes prompts.
    """
    if not any(prompt.negative for prompt in prompts):
        return
    if backbone.passes(backbone.guidance if guidance is None else guidance) == 1:
        raise ValueError(
            "negative prompts need a teacher with classifier-free guidance, which "
            f"{backbone.family} has not at this guidance"
        )
    if not getattr(backbone, "negatives_are_prompts", True):
        raise ValueError(
            f"{backbone.family} encodes a negative prompt otherwise than a prompt, so prompts "
            "cannot have negative ones of their own"
        )


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
    return EncodedPrompts.of(prompts, tuple(tables), places)


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
