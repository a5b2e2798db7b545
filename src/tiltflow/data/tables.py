"""Prompt sets that are tables: CSV and TSV, parquet and Arrow, and what `datasets` keeps."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiltflow.core.paths import read_text
from tiltflow.core.sentences import printable

SEPARATED = {".csv": ",", ".tsv": "\t"}
DATASETS = "datasets:"
"""How a source begins that is the name of a set in the cache of `datasets`."""

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, and what is in it."""

SHARD = re.compile(r"(\w[\w.]*)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?")
"""A numbered part by its file's stem: of what, its number from 0, and of how many."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
"""What a split is called in the name of a file."""


def read_folder(folder: Path, split: str | None, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of a folder: of its parquet, CSV or TSV files in the order of their names, or of
    what `datasets` saved to disk.

    Raises:
        ValueError: if there is none of these, or several splits of which none is chosen, or a file
            whose name says no split beside one whose name does, or as `read_table`.
    """
    for part in _parts(folder, split):
        yield from read_table(part, keys)


def read_table(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, which is to have one of the columns `keys`.

    Raises:
        ValueError: if it has not, or cannot be read, or a package for it is missing.
    """
    mark = SEPARATED.get(path.suffix.lower())
    if mark is not None:
        return _read_separated(path, mark, keys)
    return _read_arrow(path, keys)


def _read_separated(path: Path, mark: str, keys: Sequence[str]) -> Iterator[Row]:
    """The rows under a header, all values text; quoted cells may hold line ends (RFC 4180)."""
    lines = io.StringIO(read_text(path, f"prompts: {path}"), newline="")
    reader = csv.reader(lines, delimiter=mark, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"prompts: {path} has two columns {printable(twice)!r}")
        _check_columns(str(path), header, keys)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"prompts: {place} has {len(row)} cells, but there are {len(header)} columns"
                )
            yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        line = f"{path}, line {reader.line_num}"
        raise ValueError(f"prompts: {line} cannot be read as a table ({error})") from error


def _check_columns(source: str, there: Sequence[str], keys: Sequence[str]) -> None:
    if not set(keys) & set(there):
        found = printable(", ".join(there), 100)
        asked = (
            f"none of the columns {', '.join(keys)}" if len(keys) > 1 else f"no column {keys[0]!r}"
        )
        raise ValueError(f"prompts: {source} has {asked}; it has {found}")


def read_datasets(name: str, split: str | None, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of a set that `datasets` has in its local cache, `[OWNER/]NAME[:CONFIGURATION]`.

    The network is used only where the environment says HF_HUB_OFFLINE=0 or HF_DATASETS_OFFLINE=0.

    Raises:
        ValueError: if there is no such set, it has several splits of which none is chosen, or as
            `read_table`.
    """
    source = f"{DATASETS}{name}"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) or ".." in name:
        raise ValueError(
            f"prompts: {printable(source, 80)!r} names no set: write {DATASETS}OWNER/NAME"
        )
    path, _, configuration = name.partition(":")
    if Path(path).exists():
        raise ValueError(f"prompts: {path} is a folder or a file here: give it without {DATASETS}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"prompts: reading {source} needs datasets (pip install 'tiltflow[datasets]')"
        ) from error
    try:
        with _offline(datasets):
            sets = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # whatever it raises, the set could not be had
        said = printable(str(error), 200)
        raise ValueError(
            f"prompts: {source} is not in the local cache of datasets ({said}); to have it "
            "downloaded, set HF_HUB_OFFLINE=0"
        ) from error
    names = {part: [part] for part in sets}
    if split is None and len(names) == 1:
        (split,) = names
    rows = sets[_chosen(source, names, split)[0]]
    arrow = importlib.import_module("pyarrow")
    columns = _columns(source, rows.features.arrow_schema, keys, arrow)
    table = rows.select_columns(columns).with_format("arrow")[:]
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{source}, row {number}", row


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Has `datasets` look into its cache alone, unless the environment allows more."""
    before = datasets.config.HF_HUB_OFFLINE
    allowed = "0" in (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("HF_DATASETS_OFFLINE"))
    datasets.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _parts(folder: Path, split: str | None) -> list[Path]:
    """The tables of a directory: its parquet, CSV or TSV files, or those that `datasets` saved to
    disk."""
    if (folder / "dataset_dict.json").is_file():
        saved = {p.parent.name: [p.parent] for p in sorted(folder.glob("*/state.json"))}
        return _saved(_chosen(folder, saved, split)[0], None)
    if (folder / "state.json").is_file():
        return _saved(folder, split)
    tables = (".parquet", *SEPARATED)
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in tables)
    if not found:
        raise ValueError(
            f"prompts: {folder} is a directory without parquet, CSV or TSV files or a saved "
            "dataset in it"
        )
    kinds = sorted({file.suffix.lower() for file in found})
    if len(kinds) > 1:
        raise ValueError(
            f"prompts: {folder} holds {' and '.join(kinds)} files, which are never read together: "
            "give one of them, or a folder of one kind"
        )
    _check_whole(folder, found)
    named: dict[str, list[Path]] = {}
    for file in found:
        named.setdefault(split_name(file.name), []).append(file)
    unnamed = named.pop("", [])
    if named and unnamed:
        # Beside "captions_test.csv", "captions.csv" may be the rest or all there is: read together,
        # what is held out is trained on, and of the splits by name it would be left out unseen.
        raise ValueError(
            f"prompts: {folder} holds several splits: {', '.join(named)} by name, and "
            f"{printable(unnamed[0].name, 80)!r}, whose name says none: say it there, move that "
            "file elsewhere, or give one file"
        )
    if split is None and len(named) < 2:
        return found
    return _chosen(folder, named, split)


def _check_whole(folder: Path, files: Sequence[Path]) -> None:
    """Raises ValueError where files are numbered parts of a whole and some of them are missing, or
    there twice: a folder that was fetched into anew has parts with other hashes."""
    wholes: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for file in files:
        if part := SHARD.fullmatch(file.stem):
            wholes[part[1], int(part[3])].append(int(part[2]))
    for (name, count), numbers in wholes.items():
        there = len(set(numbers) & set(range(count)))
        if there != count:
            raise ValueError(
                f"prompts: {folder} has {there} of the {count} parts of {printable(name)!r}: "
                "fetch the others, or rename what is to be read alone"
            )
        if len(numbers) != count:
            raise ValueError(
                f"prompts: {folder} has {len(numbers)} files for the {count} parts of "
                f"{printable(name)!r}: keep one of each number"
            )


def split_name(file: str) -> str:
    """The split of a file by the names that the hub gives them ("train-00000-of-00003"),
    or by a word in it ("my_test.parquet"); "" if there is none."""
    stem = Path(file).stem
    if shard := SHARD.fullmatch(stem):
        return shard[1]
    words = (SPLITS.get(word) for word in re.split(r"[^a-z]+", stem.lower()))
    return next((split for split in words if split), "")


def _chosen(source: Path | str, splits: Mapping[str, list[Path]], split: str | None) -> list[Path]:
    """The one of several splits that is asked for.

    Raises:
        ValueError: naming them, if none of them is, or another.
    """
    listed = ", ".join(splits)
    if split is not None and split in splits:
        return splits[split]
    if split is None:
        own = f"give the folder of one ({listed}), or its name"
        what = own if isinstance(source, Path) else f"give one ({listed})"
        raise ValueError(f"prompts: {source} holds several splits; {what} as data.split")
    raise ValueError(f"prompts: {source} has no split {split!r}; it has {listed or 'none'}")


def _saved(folder: Path, split: str | None) -> list[Path]:
    """The tables of one saved dataset, which may say of which split it is."""
    state = folder / "state.json"
    text = read_text(state, f"prompts: {state}")
    try:
        saved = json.loads(text)
        tables = [folder / Path(part["filename"]).name for part in saved["_data_files"]]
        own = saved.get("_split")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"prompts: {state} is none of datasets.save_to_disk") from error
    if split not in (None, own):
        raise ValueError(f"prompts: {folder} is of the split {own!r}, not {split!r}")
    return tables


def _columns(source: str, schema: Any, keys: Sequence[str], arrow: Any) -> list[str]:
    """The columns that are read. Those with bytes in them are left where they are: sets such as
    Pick-a-Pic carry gigabytes of pictures."""
    _check_columns(source, schema.names, keys)
    return [f.name for f in schema if not _has_bytes(f.type, arrow.types)]


def _has_bytes(kind: Any, types: Any) -> bool:
    """Whether values of an Arrow type are bytes, or hold some: a picture is {bytes, path}."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(is_a(kind) for is_a in binary) or any(_has_bytes(each, types) for each in inner)


def _read_arrow(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of a parquet file, or of an Arrow stream as `datasets` saves it."""
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"prompts: reading {path} needs pyarrow (pip install 'tiltflow[parquet]')"
        ) from error
    try:
        if path.suffix == ".arrow":
            with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
                columns = _columns(str(path), stream.schema, keys, arrow)
                rows = stream.read_all().select(columns).to_pylist()
        else:
            columns = _columns(str(path), parquet.read_schema(path), keys, arrow)
            rows = parquet.read_table(path, columns=columns).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        kind = "an Arrow stream" if path.suffix == ".arrow" else "parquet"
        raise ValueError(f"prompts: {path} cannot be read as {kind}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row
