"""Embeddings kept on disk: encoded once for all runs, read through a memory map.

    CACHE/KEY/encoder.json           what KEY is the digest of
    CACHE/KEY/CHECKSUM.safetensors   a shard: texts, their rows, the empty prompt's row

A shard is written aside and renamed, and its name is the checksum of its bytes: there is no index
that could disagree with it, a kill loses the shard being written and no other, and a shard that was
cut or changed is noticed. One process at a time writes under a KEY; any number read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tiltflow.core.disk import fsync, save_tensors, sha256
from tiltflow.core.sentences import counted
from tiltflow.data.embeddings import (
    BATCH,
    EncodedPrompts,
    distinct,
    encode_prompts,
    encoded_batches,
)
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Backbone, Conditioning

FORMAT = "tiltflow-embeddings-1"
"""Part of every key and shard. Raise its number when shards are laid out otherwise, and when a
builtin family encodes otherwise (`_encode`, `_encode_negative`, `default_sequence`): the code of
builtin families is in no key, so that an upgrade keeps caches that took hours."""
SHARD_BYTES = 256 * 2**20
SHARD_TEXTS = 8192
"""A shard ends with the batch that reaches one of these; the texts stand in its header."""

_SHARD = re.compile(r"[0-9a-f]{64}\.safetensors")

Notice = Callable[[str], None]


@dataclass(frozen=True)
class EncoderKey:
    """What an embedding depends on besides its text.

    `source` is where the encoders lie, which only messages use; `facts` are settings, versions,
    and the checksums of files by their name.
    """

    source: str
    facts: Mapping[str, str | int | None]

    @property
    def digest(self) -> str:
        ordered = json.dumps({"format": FORMAT, **self.facts}, sort_keys=True)
        return hashlib.sha256(ordered.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Found:
    """Tables as `EncodedPrompts` has them, each text's table and row, and the shards they are of.

    `damaged` says of each shard that cannot be used what is wrong with it.
    """

    tables: tuple[Conditioning, ...] = ()
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    shards: frozenset[Path] = frozenset()
    damaged: Mapping[Path, str] = field(default_factory=dict)

    def without(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that were not found."""
        return [text for text in texts if text not in self.places]


class EmbeddingCache:
    """The embeddings under one key in a cache directory."""

    def __init__(self, root: Path, key: EncoderKey) -> None:
        self.root = root
        self.key = key
        self.folder = root / key.digest

    def read(self, texts: Sequence[str], known: Found | None = None) -> Found:
        """What the cache holds of `texts`, on top of what is `known`; every shard used is verified.

        Tensors are views of memory-mapped files.
        """
        known = known or Found()
        wanted = set(known.without(texts))
        tables, places, shards = list(known.tables), dict(known.places), set(known.shards)
        damaged = {}
        for file in self._shards():
            if not wanted or file in shards:
                continue
            try:
                inside = _texts(file)
                if wanted.isdisjoint(inside):
                    continue
                table = _table(file, len(inside))
            except FileNotFoundError:  # another process has just dropped it
                continue
            except (SafetensorError, ValueError) as error:
                damaged[file] = str(error)
                continue
            places |= {text: (len(tables), i) for i, text in enumerate(inside) if text in wanted}
            wanted.difference_update(inside)
            tables.append(table)
            shards.add(file)
        return Found(tuple(tables), places, frozenset(shards), damaged)

    def write(self, texts: Sequence[str], parts: Sequence[Conditioning]) -> Path:
        """One shard, atomically; the caller holds the lock.

        Raises:
            ValueError: if the disk is full or does not let it be written.
        """
        tensors = {f"negative.{key}": value for key, value in parts[0].negative.items()}
        for key in parts[0].positive:
            tensors[f"positive.{key}"] = torch.cat([part.positive[key] for part in parts])
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        temporary = self.folder / f".tmp-{os.getpid()}"
        try:
            # one entry, because safetensors writes several in any order
            save_tensors(tensors, temporary, {FORMAT: json.dumps(list(texts))})
            fsync(temporary)
            target = self.folder / f"{sha256(temporary)}.safetensors"
            os.replace(temporary, target)
            fsync(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise self._refusal(error) from error
        return target

    @contextmanager
    def locked(self, notice: Notice) -> Iterator[None]:
        """Holds the right to write; a process that is killed gives it back.

        (filelock takes as many lines, asks twenty times a second where flock waits, and unless told
        otherwise makes do with a file of its own where there is no flock.)

        Raises:
            ValueError: if the directory cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("a")
        except OSError as error:
            raise self._refusal(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notice(f"another process is encoding into {self.folder}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            for leftover in self.folder.glob(".tmp-*"):
                leftover.unlink()
            yield

    def _refusal(self, error: Exception) -> ValueError:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return ValueError(
            f"the embedding cache {self.root} cannot be written ({reason}): give another "
            "directory as data.cache, or data.cache=off"
        )

    def describe(self, notice: Notice) -> None:
        """Writes what the key stands for, and says what differs from an earlier one's encoders."""
        file = self.folder / "encoder.json"
        if file.is_file():
            return
        earlier = self._earlier()
        if earlier is not None:
            names = sorted({*earlier, *self.key.facts})
            changed = [name for name in names if earlier.get(name) != self.key.facts.get(name)]
            notice(
                f"since prompts of {self.key.source} were last encoded, {', '.join(changed)} "
                f"changed: encoding them again"
            )
        temporary = self.folder / f".tmp-{os.getpid()}-encoder"
        content = {"source": self.key.source, "facts": dict(self.key.facts)}
        try:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._refusal(error) from error

    def _earlier(self) -> dict[str, Any] | None:
        """The facts of the newest other key with this source."""
        files = [file for file in self.root.glob("*/encoder.json") if file.is_file()]
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if isinstance(content, dict) and content.get("source") == self.key.source:
                facts = content.get("facts")
                return facts if isinstance(facts, dict) else None
        return None

    def _shards(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(file for file in self.folder.iterdir() if _SHARD.fullmatch(file.name))


def encode_cached(
    cache: EmbeddingCache,
    texts: Sequence[str],
    load: Callable[[], Backbone],
    *,
    batch_size: int = BATCH,
    shard_bytes: int = SHARD_BYTES,
    notice: Notice = lambda message: None,
) -> Found:
    """The embeddings of distinct texts: from the cache, and what it lacks encoded into it.

    `load` gives a backbone that can encode. It is called only if something is lacking, and its text
    encoders are dropped afterwards. `notice` gets a line a shard, and what is damaged or changed.

    Raises:
        ValueError: if the cache cannot be written, or its disk is too small.
    """
    found = cache.read(texts)
    if not found.without(texts):
        return found
    with cache.locked(notice):
        found = cache.read(texts, found)
        for file, problem in found.damaged.items():
            notice(f"{file} {problem}: its prompts are encoded again")
            file.unlink(missing_ok=True)
        lacking = found.without(texts)
        if lacking:
            cache.describe(notice)
            known = counted(len(texts) - len(lacking), "is", "are")
            notice(f"encoding {counted(len(lacking), 'prompt')}, {known} cached")
            backbone = load()
            _fill(cache, backbone, lacking, batch_size, shard_bytes, notice)
            backbone.free_text_encoders()
            found = cache.read(texts, found)
    if found.without(texts):
        raise ValueError(f"{cache.folder} does not give back what was just written into it")
    return found


def encoded_sets(
    cache: EmbeddingCache | None,
    sets: Sequence[Sequence[Prompt]],
    load: Callable[[], Backbone],
    *,
    batch_size: int = BATCH,
    notice: Notice = lambda message: None,
) -> list[EncodedPrompts]:
    """Prompt sets with their embeddings, each text encoded once: out of the cache if there is one.

    `load` is as of `encode_cached`.

    Raises:
        ValueError: if a set is empty, or as `encode_cached`.
    """
    texts = distinct([prompt for chosen in sets for prompt in chosen])
    if cache is None:
        notice(f"encoding {counted(len(texts), 'prompt')}")
        backbone = load()
        whole = encode_prompts(backbone, [Prompt(text) for text in texts], batch_size)
        backbone.free_text_encoders()
        tables, places = whole.tables, dict(zip(texts, whole.places, strict=True))
    else:
        found = encode_cached(cache, texts, load, batch_size=batch_size, notice=notice)
        tables, places = found.tables, dict(found.places)
    return [EncodedPrompts.of(chosen, tables, places) for chosen in sets]


def _fill(
    cache: EmbeddingCache,
    backbone: Backbone,
    texts: Sequence[str],
    batch_size: int,
    shard_bytes: int,
    notice: Notice,
) -> None:
    """Encodes texts into shards."""
    parts: list[Conditioning] = []
    begin = size = 0
    for part in encoded_batches(backbone, texts, batch_size):
        if not parts and begin == 0:
            _check_space(cache.root, _bytes(part) * len(texts) // len(part))
        parts.append(part)
        size += _bytes(part)
        count = sum(map(len, parts))
        done = begin + count
        if size >= shard_bytes or count >= SHARD_TEXTS or done == len(texts):
            cache.write(texts[begin:done], parts)
            notice(f"encoded {done} of {counted(len(texts), 'prompt')}")
            parts, begin, size = [], done, 0


def _bytes(part: Conditioning) -> int:
    return sum(value.numel() * value.element_size() for value in part.positive.values())


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ValueError(
            f"the embeddings take {needed / 1e9:.1f} GB, and {root} has {free / 1e9:.1f} GB free: "
            "give another directory as data.cache, or data.cache=off"
        )


def _texts(file: Path) -> list[str]:
    """The texts in a shard's header.

    Raises:
        ValueError: if it is no shard; SafetensorError: if header and length disagree.
    """
    with safe_open(file, framework="pt") as shard:
        metadata = shard.metadata() or {}
    if FORMAT not in metadata:
        raise ValueError(f"does not say {FORMAT!r}")
    texts = json.loads(metadata[FORMAT])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("does not list its texts")
    return texts


def _table(file: Path, rows: int) -> Conditioning:
    """A shard's tensors, memory-mapped, after its checksum.

    Raises:
        ValueError: if the checksum or the number of rows is another.
    """
    if sha256(file) != file.stem:
        raise ValueError("does not match its checksum")
    sides: dict[str, dict[str, torch.Tensor]] = {"positive": {}, "negative": {}}
    for name, value in load_file(file).items():
        side, _, key = name.partition(".")
        sides.setdefault(side, {})[key] = value
    if not sides["positive"] or any(len(value) != rows for value in sides["positive"].values()):
        raise ValueError(f"does not hold {rows} rows")
    return Conditioning(sides["positive"], sides["negative"])
