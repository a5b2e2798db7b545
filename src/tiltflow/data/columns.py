"""What the columns of a prompt set are called, and the weights that one of them holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tiltflow.core.paths import nearest
from tiltflow.core.settings import Section, Text, settled

if TYPE_CHECKING:
    from tiltflow.data.prompts import Prompt


class Columns(Section):
    """The columns (or keys of an object) of a prompt set that are not called as usual.

    `prompt`: unset is the first of `prompt`, `text` and `caption` that is there. `category`: what
    `evaluate` groups prompts by; unset is `tag`, `category` or `atom_count`. `weight`: how often a
    prompt is drawn beside the others; unset, all alike. `negative`: what the teacher is guided away
    from; unset, and where there is nothing, the family's own negative prompt.
    """

    prompt: Text | None = None
    category: Text | None = None
    weight: Text | None = None
    negative: Text | None = None

    def about(self, row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
        """A prompt's metadata: its row, with the category where it is looked for.

        Raises:
            ValueError: if the row has no category in the column that is named.
        """
        if self.category is None:
            return row
        value = row.get(self.category)
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise ValueError(f"prompts: {place} has no category as {self.category!r}")
        return {**row, "category": str(value)}

    def negative_of(self, row: Mapping[str, Any], place: str) -> str | None:
        """A row's negative prompt, if it has one.

        Raises:
            ValueError: if the row has no such column, or what stands there is no text.
        """
        if self.negative is None:
            return None
        value = row.get(self.negative, 0)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"prompts: {place} has no negative prompt as {self.negative!r}")
        return value.strip() or None if value is not None else None


def columns_of(given: Mapping[str, str]) -> Columns:
    """Columns of prompts that are sampled or scored, where no weight means anything.

    Raises:
        ValueError: if there is no such key, or a name is none.
    """
    known = [key for key in Columns.model_fields if key != "weight"]
    for key in given:
        if key not in known:
            raise ValueError(f"a prompt file has no column {key!r} to name{nearest(key, known)}")
    return settled(Columns, given)


def weights_of(column: str | None, prompts: Sequence[Prompt]) -> tuple[float, ...] | None:
    """Each prompt's weight in a column of its set; None without a column.

    Raises:
        ValueError: if one is no number, negative or not finite (naming the first), or all are 0.
    """
    if column is None:
        return None
    weights = tuple(
        _weight(column, number, prompt.metadata) for number, prompt in enumerate(prompts, start=1)
    )
    if not any(weights):
        raise ValueError(f"prompts: every weight in {column!r} is 0, so none would be drawn")
    return weights


def _weight(column: str, number: int, metadata: Mapping[str, Any]) -> float:
    value = metadata.get(column)
    try:
        weight = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if isinstance(value, bool) or not 0 <= weight < math.inf:
        said = "none" if value is None else repr(value)[:60]
        raise ValueError(
            f"prompts: the weight of prompt {number} in {column!r} is {said}; it is to be a number "
            "of 0 or more"
        )
    return weight
