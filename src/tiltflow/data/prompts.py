"""Prompt sets in the formats people have, and the order in which a run goes through them."""

from __future__ import annotations

import difflib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tiltflow.core.paths import home_for_tilde, misspelt, read_text
from tiltflow.core.randomness import Randomness
from tiltflow.data.columns import Columns
from tiltflow.data.tables import DATASETS, SEPARATED, Row, read_datasets, read_folder, read_table
from tiltflow.rewards.worlds import shapes

TEXT_KEYS = ("prompt", "text", "caption")
FINEST, GRID = 2**40, 2**24
"""Steps of the heaviest prompt's weight, and of the place between two draws of an epoch."""
FORMATS = (".txt", ".json", ".jsonl", *SEPARATED, ".parquet")

Plain = tuple[str, object]
"""Where a value stands, and the value."""


@dataclass(frozen=True)
class Prompt:
    """A caption, and the whole object it came with (GenEval's tags, questions, …); `negative` is
    what the teacher is guided away from, the family's own negative prompt where it is None."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = None


@cache
def _captions(held_out: bool, n: int) -> tuple[shapes.Caption, ...]:
    """Kept for the next run of a process. (The prompts are not: a reward may write in what it is
    given of them.)"""
    return tuple(shapes.balanced(held_out, n))


def _shapes(held_out: bool, n: int) -> list[Prompt]:
    return [Prompt(c.text, c.metadata()) for c in _captions(held_out, n)]


# The train split has far more captions of two coloured objects than of anything else: the six
# categories in equal shares instead. The mixture knows no text: one empty prompt.
PACKAGED: dict[str, Callable[[], list[Prompt]]] = {
    "shapes-train": lambda: _shapes(False, 12_000),
    "shapes-heldout": lambda: _shapes(True, 1_024),
    "mixture": lambda: [Prompt("")],
}


def load_prompts(
    source: str | Path, split: str | None = None, columns: Columns | None = None
) -> list[Prompt]:
    """The prompts of a packaged set or a file, in order, duplicates kept.

    A `.txt` has one prompt a line; `.json` a list of strings or objects; `.jsonl` one string or
    object a line (GenEval, GenEval2 and general); `.csv`, `.tsv` and `.parquet` one row a prompt; a
    directory either such tables, which are read in the order of their names, or what `datasets`
    saved to disk; `datasets:NAME` is a set in the local cache of `datasets`.
    Of a source with several splits (`train-00000-of-00001.parquet` beside `test-…`, or a saved
    `DatasetDict`), `split` names the one that is meant: they are never read together, nor is a file
    whose name says no split (`captions.csv`) beside one whose name does (`captions_test.csv`).
    An object's prompt is its `prompt`, `text` or `caption`, unless `columns` says otherwise, and
    its metadata the whole object. Blank lines are skipped, surrounding white space is dropped.

    Raises:
        ValueError: on anything that cannot be read as at least one prompt, saying where.
    """
    chosen = columns or Columns()
    if str(source) in PACKAGED:
        _no_split(str(source), split)
        if chosen != Columns():
            raise ValueError(f"prompts: {source} is a packaged set, whose columns have no names")
        return PACKAGED[str(source)]()
    prompts = [_prompt(value, place, chosen) for place, value in _values(source, split, chosen)]
    if not prompts:
        raise ValueError(f"prompts: {source} has no prompts in it")
    return prompts


def _values(source: str | Path, split: str | None, columns: Columns) -> Iterator[Row | Plain]:
    """What is to be a prompt, each with where it stands."""
    name, keys = str(source), _keys(columns)
    if name.startswith(DATASETS):
        return read_datasets(name.removeprefix(DATASETS), split, keys)
    path = Path(home_for_tilde(name))
    suffix = path.suffix.lower()
    if path.is_dir():
        return read_folder(path, split, keys)
    _no_split(name, split)
    if not path.exists():
        raise ValueError(_missing(name, suffix))
    if suffix not in FORMATS:
        raise ValueError(f"prompts: {source} should end in one of {', '.join(FORMATS)}")
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl}
    return readers[suffix](path) if suffix in readers else read_table(path, keys)


def _no_split(source: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"prompts: {source} has no splits, so there is no {split!r} of it")


def _missing(source: str, suffix: str) -> str:
    if suffix:
        return f"prompts: there is no file {source}{misspelt(source)}"
    nearest = difflib.get_close_matches(source, PACKAGED, n=1, cutoff=0.0)[0]
    return f"prompts: there is no file or packaged set {source!r}; the nearest set is {nearest!r}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines with their numbers from 1; only newlines end a line, not U+2028."""
    for number, line in enumerate(read_text(path, f"prompts: {path}").split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _keys(columns: Columns) -> tuple[str, ...]:
    return TEXT_KEYS if columns.prompt is None else (columns.prompt,)


def _prompt(value: object, place: str, columns: Columns) -> Prompt:
    """A prompt from a string or an object; `place` says where it stands."""
    metadata: Mapping[str, Any] = {}
    negative = None
    if isinstance(value, Mapping):
        keys = _keys(columns)
        metadata, negative = columns.about(value, place), columns.negative_of(value, place)
        key = next((key for key in keys if value.get(key) is not None), None)
        if key is None:
            raise ValueError(f"prompts: {place} has none of the keys {', '.join(keys)}")
        value = value[key]
    elif columns != Columns():
        raise ValueError(f"prompts: {place} is a prompt alone, without columns")
    if not isinstance(value, str):
        raise ValueError(f"prompts: {place} is not a string, nor an object with a prompt")
    if not value.strip():
        raise ValueError(f"prompts: {place} is an empty prompt")
    if any("\ud800" <= letter <= "\udfff" for letter in value + (negative or "")):
        raise ValueError(f"prompts: {place} has half a surrogate pair, which is no text")
    return Prompt(value.strip(), metadata, negative)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: {place} is not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"prompts: {place} is nested too deeply") from error


def _read_txt(path: Path) -> Iterator[Plain]:
    for number, line in _lines(path):
        yield f"{path}, line {number}", line


def _read_jsonl(path: Path) -> Iterator[Plain]:
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        yield place, _parse(line, place)


def _read_json(path: Path) -> Iterator[Plain]:
    text = read_text(path, f"prompts: {path}")
    if not text.strip():
        return
    values = _parse(text, str(path))
    if not isinstance(values, list):
        raise ValueError(f"prompts: {path} should hold a JSON list of strings or objects")
    for number, value in enumerate(values, start=1):
        yield f"{path}, item {number}", value


@dataclass(frozen=True)
class PromptSampler:
    """The endless order of `n` prompts: epoch after epoch, each in its own seeded order; with
    `among`, of the `n` prompts that have these numbers.

    With `weights` (n,) an epoch of n draws has prompt i n·wᵢ/Σw times, rounded up or down (by
    systematic sampling: the draws are evenly spaced on the line of the weights, from a point that
    is drawn for the epoch). So weights that are alike are none, draw by draw.

    Raises:
        ValueError: if n < 1.
    """

    n: int
    randomness: Randomness
    among: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("there are no prompts to sample from")
        assert self.weights is None or (len(self.weights) == self.n and max(self.weights) > 0)

    def indices(self, position: int, count: int) -> list[int]:
        """The prompts at the global positions position … position + count − 1.

        A function of its arguments alone: two halves of a batch give what the whole gives.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        places = self._places(position, count)
        return places if self.among is None else [self.among[place] for place in places]

    def of(self, among: tuple[int, ...]) -> PromptSampler:
        """The same of some of the prompts alone."""
        weights = None if self.weights is None else tuple(self.weights[i] for i in among)
        return replace(self, n=len(among), among=among, weights=weights)

    def _places(self, position: int, count: int) -> list[int]:
        if self.n == 1:
            return [0] * count
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, start = divmod(position + len(chosen), self.n)
            order = self.randomness.permutation("prompts", epoch, self.n)
            part = order[start : start + count - len(chosen)].tolist()
            chosen += part if self.weights is None else self._weighted(epoch, part)
        return chosen

    def _weighted(self, epoch: int, draws: list[int]) -> list[int]:
        """The prompts of draws 0 … n − 1 of an epoch, in whole numbers, so that none is lost or
        drawn twice by rounding."""
        ends = self._ends
        begin = int(self.randomness.integers("prompts/weighted", epoch, 0, GRID, (1,)))
        step = self.n * GRID
        return [bisect_right(ends, (j * GRID + begin) * ends[-1] // step) for j in draws]

    @cached_property
    def _ends(self) -> list[int]:
        """Where each prompt's piece ends on the line of the weights; the heaviest is `FINEST`
        long, and what weighs anything 1 at least."""
        assert self.weights is not None
        most = max(self.weights)
        return list(accumulate(max(1, round(w / most * FINEST)) if w else 0 for w in self.weights))
