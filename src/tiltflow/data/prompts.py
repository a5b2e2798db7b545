"""Prompt sets in the formats people have, and the order in which a run goes through them."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiltflow.core.paths import home_for_tilde, read_text
from tiltflow.core.randomness import Randomness
from tiltflow.rewards.worlds import shapes

TEXT_KEYS = ("prompt", "text", "caption")
FORMATS = (".txt", ".json", ".jsonl", ".parquet")

SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
"""What a split is called in the name of a file."""


@dataclass(frozen=True)
class Prompt:
    """A caption, and the whole object it came with (GenEval's tags, questions, …)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _shapes(held_out: bool, n: int) -> list[Prompt]:
    return [Prompt(c.text, c.metadata()) for c in shapes.balanced(held_out, n)]


# The train split has far more captions of two coloured objects than of anything else: the six
# categories in equal shares instead. The mixture knows no text: one empty prompt.
PACKAGED: dict[str, Callable[[], list[Prompt]]] = {
    "shapes-train": lambda: _shapes(False, 12_000),
    "shapes-heldout": lambda: _shapes(True, 1_024),
    "mixture": lambda: [Prompt("")],
}


def load_prompts(source: str | Path, split: str | None = None) -> list[Prompt]:
    """The prompts of a packaged set or a file, in order, duplicates kept.

    A `.txt` has one prompt a line; `.json` a list of strings or objects; `.jsonl` one string or
    object a line (GenEval, GenEval2 and general); `.parquet` one row a prompt; a directory either
    parquet files, which are read in the order of their names, or what `datasets` saved to disk.
    Of a directory with several splits (`train-00000-of-00001.parquet` beside `test-…`, or a saved
    `DatasetDict`), `split` names the one that is meant: they are never read together.
    An object's prompt is its `prompt`, `text` or `caption`, and its metadata the whole object.
    Blank lines are skipped, surrounding white space is dropped.

    Raises:
        ValueError: on anything that cannot be read as at least one prompt, saying where.
    """
    if str(source) in PACKAGED:
        _no_split(str(source), split)
        return PACKAGED[str(source)]()
    path = Path(home_for_tilde(str(source)))
    suffix = path.suffix.lower()
    if not path.exists():
        raise ValueError(_missing(str(source), suffix))
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl}
    if path.is_dir():
        prompts = [prompt for part in _parts(path, split) for prompt in _read_table(part)]
    elif suffix in FORMATS:
        _no_split(str(source), split)
        prompts = list(readers.get(suffix, _read_table)(path))
    else:
        raise ValueError(f"prompts: {source} should end in one of {', '.join(FORMATS)}")
    if not prompts:
        raise ValueError(f"prompts: {source} has no prompts in it")
    return prompts


def _no_split(source: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"prompts: {source} has no splits, so there is no {split!r} of it")


def _missing(source: str, suffix: str) -> str:
    if suffix:
        return f"prompts: there is no file {source}"
    nearest = difflib.get_close_matches(source, PACKAGED, n=1, cutoff=0.0)[0]
    return f"prompts: there is no file or packaged set {source!r}; the nearest set is {nearest!r}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines with their numbers from 1; only newlines end a line, not U+2028."""
    for number, line in enumerate(read_text(path, f"prompts: {path}").split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _prompt(value: object, place: str) -> Prompt:
    """A prompt from a string or an object; `place` says where it stands."""
    metadata: Mapping[str, Any] = {}
    if isinstance(value, Mapping):
        metadata = value
        key = next((key for key in TEXT_KEYS if value.get(key) is not None), None)
        if key is None:
            raise ValueError(f"prompts: {place} has none of the keys {', '.join(TEXT_KEYS)}")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"prompts: {place} is not a string, nor an object with a prompt")
    if not value.strip():
        raise ValueError(f"prompts: {place} is an empty prompt")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"prompts: {place} has half a surrogate pair, which is no text")
    return Prompt(value.strip(), metadata)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: {place} is not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"prompts: {place} is nested too deeply") from error


def _read_txt(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        yield _prompt(line, f"{path}, line {number}")


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        yield _prompt(_parse(line, place), place)


def _read_json(path: Path) -> Iterator[Prompt]:
    text = read_text(path, f"prompts: {path}")
    if not text.strip():
        return
    values = _parse(text, str(path))
    if not isinstance(values, list):
        raise ValueError(f"prompts: {path} should hold a JSON list of strings or objects")
    for number, value in enumerate(values, start=1):
        yield _prompt(value, f"{path}, item {number}")


def _parts(folder: Path, split: str | None) -> list[Path]:
    """The tables of a directory: the parquet files, or those that `datasets` saved to disk."""
    if (folder / "dataset_dict.json").is_file():
        saved = {p.parent.name: [p.parent] for p in sorted(folder.glob("*/state.json"))}
        return _saved(_chosen(folder, saved, split)[0], None)
    if (folder / "state.json").is_file():
        return _saved(folder, split)
    found = sorted(folder.glob("*.parquet"))
    if not found:
        raise ValueError(
            f"prompts: {folder} is a directory without parquet files or a saved dataset in it"
        )
    named: dict[str, list[Path]] = {}
    for file in found:
        named.setdefault(split_name(file.name), []).append(file)
    named.pop("", None)
    if split is None and len(named) < 2:
        return found
    return _chosen(folder, named, split)


def split_name(file: str) -> str:
    """The split of a parquet file by the names that the hub gives them ("train-00000-of-00003"),
    or by a word in it ("my_test.parquet"); "" if there is none."""
    stem = file.removesuffix(".parquet")
    if shard := SHARD.fullmatch(stem):
        return shard[1]
    words = (SPLITS.get(word) for word in re.split(r"[^a-z]+", stem.lower()))
    return next((split for split in words if split), "")


def _chosen(folder: Path, splits: Mapping[str, list[Path]], split: str | None) -> list[Path]:
    """The one of several splits that is asked for.

    Raises:
        ValueError: naming them, if none of them is, or another.
    """
    listed = ", ".join(splits)
    if split is not None and split in splits:
        return splits[split]
    if split is None:
        raise ValueError(
            f"prompts: {folder} holds several splits; give the folder of one ({listed}), or its "
            "name as data.split"
        )
    raise ValueError(f"prompts: {folder} has no split {split!r}; it has {listed or 'none'}")


def _saved(folder: Path, split: str | None) -> list[Path]:
    """The tables of one saved dataset, which may say of which split it is."""
    state = folder / "state.json"
    saved = _parse(read_text(state, f"prompts: {state}"), str(state))
    try:
        tables = [folder / Path(part["filename"]).name for part in saved["_data_files"]]
        own = saved.get("_split")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"prompts: {state} is none of datasets.save_to_disk") from error
    if split not in (None, own):
        raise ValueError(f"prompts: {folder} is of the split {own!r}, not {split!r}")
    return tables


def _read_table(path: Path) -> Iterator[Prompt]:
    """The rows of a parquet file, or of an Arrow stream as `datasets` saves it.

    Columns of pictures are left where they are: sets such as Pick-a-Pic carry gigabytes of them.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"prompts: reading {path} needs pyarrow (pip install 'tiltflow[parquet]')"
        ) from error

    def chosen(schema: Any) -> list[str]:
        if not set(TEXT_KEYS) & set(schema.names):
            raise ValueError(f"prompts: {path} has none of the columns {', '.join(TEXT_KEYS)}")
        pictures = (arrow.types.is_binary, arrow.types.is_large_binary, arrow.types.is_struct)
        return [f.name for f in schema if not any(is_a(f.type) for is_a in pictures)]

    try:
        if path.suffix == ".arrow":
            with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
                rows = stream.read_all().select(chosen(stream.schema)).to_pylist()
        else:
            columns = chosen(parquet.read_schema(path))
            rows = parquet.read_table(path, columns=columns).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        kind = "an Arrow stream" if path.suffix == ".arrow" else "parquet"
        raise ValueError(f"prompts: {path} cannot be read as {kind}") from error
    for number, row in enumerate(rows, start=1):
        yield _prompt(row, f"{path}, row {number}")


@dataclass(frozen=True)
class PromptSampler:
    """The endless order of `n` prompts: epoch after epoch, each in its own seeded order; with
    `among`, of the `n` prompts that have these numbers.

    Raises:
        ValueError: if n < 1.
    """

    n: int
    randomness: Randomness
    among: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("there are no prompts to sample from")

    def indices(self, position: int, count: int) -> list[int]:
        """The prompts at the global positions position … position + count − 1.

        A function of its arguments alone: two halves of a batch give what the whole gives.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        places = self._places(position, count)
        return places if self.among is None else [self.among[place] for place in places]

    def _places(self, position: int, count: int) -> list[int]:
        if self.n == 1:
            return [0] * count
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, start = divmod(position + len(chosen), self.n)
            order = self.randomness.permutation("prompts", epoch, self.n)
            chosen += order[start : start + count - len(chosen)].tolist()
        return chosen
