"""The embedding cache: bit-equal, never twice, and nothing torn, cut or changed goes unnoticed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tiltflow.core.paths import embedding_cache
from tiltflow.data.embedding_cache import EmbeddingCache, EncoderKey, Found, encode_cached
from tiltflow.data.embeddings import EncodedPrompts, encode_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Conditioning

TEXTS = [f"prompt {i}" for i in range(10)]
KEY = EncoderKey("model", {"dtype": "fp32", "text_encoder/model.safetensors": "abc"})


class Encoder:
    """A text encoder that counts; a text's embedding is drawn from the text's checksum."""

    def __init__(self, pause: float = 0.0) -> None:
        self.loads = 0
        self.seen: list[str] = []
        self.freed = 0
        self.pause = pause

    def load(self) -> Any:
        self.loads += 1
        return self

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        time.sleep(self.pause)
        self.seen += [text for text in prompts if text]
        rows = torch.stack([embedding(text) for text in prompts])
        empty = embedding("").expand_as(rows)
        return Conditioning({"embeds": rows, "pooled": rows[:, 0]}, {"embeds": empty})

    def free_text_encoders(self) -> None:
        self.freed += 1


def embedding(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fill(root: Path, texts: Sequence[str] = TEXTS, key: EncoderKey = KEY, **options: Any) -> Any:
    """The result of `encode_cached` in shards of two texts, the encoder, and the notices."""
    encoder, notices = options.pop("encoder", Encoder()), []
    options = {"batch_size": 2, "shard_bytes": 1} | options
    found = encode_cached(
        EmbeddingCache(root, key), texts, encoder.load, notice=notices.append, **options
    )
    return SimpleNamespace(found=found, encoder=encoder, notices=notices)


def right(found: Found, texts: Sequence[str] = TEXTS) -> bool:
    chosen = tuple(Prompt(text) for text in texts)
    encoded = EncodedPrompts(chosen, found.tables, tuple(found.places[text] for text in texts))
    cond, prompts = encoded.select(range(len(texts)), torch.device("cpu"))
    assert [p.text for p in prompts] == list(texts)
    expected = torch.stack([embedding(text) for text in texts])
    return (
        torch.equal(cond.positive["embeds"], expected)
        and torch.equal(cond.positive["pooled"], expected[:, 0])
        and torch.equal(cond.negative["embeds"], embedding("").expand_as(expected))
    )


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def test_a_second_call_encodes_nothing_and_loads_nothing(tmp_path: Path) -> None:
    first = fill(tmp_path)
    assert right(first.found) and first.encoder.seen == TEXTS
    assert (first.encoder.loads, first.encoder.freed) == (1, 1)
    assert len(shards(tmp_path)) == 5
    second = fill(tmp_path, TEXTS[::-1])
    assert right(second.found, TEXTS[::-1]) and right(second.found)
    assert second.encoder.loads == 0 and second.notices == []


def test_only_new_texts_are_encoded(tmp_path: Path) -> None:
    fill(tmp_path, TEXTS[3:6])
    more = fill(tmp_path)
    assert right(more.found) and more.encoder.seen == TEXTS[:3] + TEXTS[6:]
    assert "encoding 7 prompts, 3 are cached" in more.notices
    assert right(fill(tmp_path, TEXTS[4:5]).found, TEXTS[4:5])


def test_shards_end_at_their_size(tmp_path: Path) -> None:
    row = 3 * 5 * 2 + 5 * 2
    fill(tmp_path, shard_bytes=3 * row)
    assert len(shards(tmp_path)) == 3  # of 4, 4 and 2 texts
    fill(tmp_path / "one", shard_bytes=10**9)
    assert len(shards(tmp_path / "one")) == 1


def test_shards_are_memory_mapped(tmp_path: Path) -> None:
    found = fill(tmp_path).found
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    mapped = maps.read_text()
    assert all(str(file) in mapped for file in shards(tmp_path))
    # a shard that is dropped while it is read stays readable
    for file in shards(tmp_path):
        file.unlink()
    assert right(found)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 7)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lie(file: Path) -> None:
    """A header that declares 2^60 bytes."""
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def swap(file: Path) -> None:
    """Another model's well-formed shard under this one's name."""
    save_file({"positive.embeds": torch.zeros(2, 3, 5)}, file, {"other": "[]"})


@pytest.mark.parametrize("damage", [flip, cut, empty, lie, swap])
def test_a_damaged_shard_is_named_and_only_its_texts_encoded(tmp_path: Path, damage: Any) -> None:
    fill(tmp_path)
    broken = shards(tmp_path)[2]
    before = {file: file.read_bytes() for file in shards(tmp_path)}
    damage(broken)
    again = fill(tmp_path)
    assert right(again.found) and len(again.encoder.seen) == 2
    named = [line for line in again.notices if str(broken) in line]
    assert len(named) == 1 and named[0].endswith("its prompts are encoded again")
    # the same bits again, so the same name
    assert {file: file.read_bytes() for file in shards(tmp_path)} == before


def test_a_changed_encoder_is_named_and_has_a_place_of_its_own(tmp_path: Path) -> None:
    fill(tmp_path)
    facts = KEY.facts | {"text_encoder/model.safetensors": "def", "dtype": "bf16"}
    other = fill(tmp_path, key=EncoderKey("model", facts))
    assert other.encoder.seen == TEXTS
    assert other.notices[0] == (
        "since prompts of model were last encoded, dtype, text_encoder/model.safetensors changed: "
        "encoding them again"
    )
    assert fill(tmp_path).encoder.loads == 0
    assert "changed" not in fill(tmp_path, key=EncoderKey("another", {"dtype": "x"})).notices[0]


def test_a_directory_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written .Not a directory.: give another"):
        fill(tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=39))
    with pytest.raises(ValueError, match="embeddings take 0.0 GB, and .* give another directory"):
        fill(tmp_path / "small", TEXTS[:2])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=80))
    assert right(fill(tmp_path / "small", TEXTS[:2]).found, TEXTS[:2])


def test_a_full_disk_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltflow.data import embedding_cache as module

    written = module.save_tensors

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        if len(shards(tmp_path)) == 3:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written(tensors, file, metadata)

    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.raises(ValueError, match="cannot be written .No space left on device."):
        fill(tmp_path)
    assert not list(tmp_path.glob("*/.tmp*"))
    monkeypatch.undo()
    assert fill(tmp_path).encoder.seen == TEXTS[6:]


MANY = [f"prompt {i}" for i in range(40)]
FORK = multiprocessing.get_context("fork")


def child(root: Path, pause: float) -> tuple[Any, Any]:
    """A process that encodes `MANY`, and where its count and whether it waited come out."""
    end, inside = FORK.Pipe(duplex=False)

    def encode() -> None:
        done = fill(root, MANY, encoder=Encoder(pause))
        assert right(done.found, MANY)
        waited = any("another process" in line for line in done.notices)
        inside.send((len(done.encoder.seen), waited))

    process = FORK.Process(target=encode)
    process.start()
    return process, end


def wait_for_shards(root: Path, count: int) -> None:
    deadline = time.time() + 60
    while len(shards(root)) < count:
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_kill_loses_only_the_shard_being_written(tmp_path: Path) -> None:
    process, _ = child(tmp_path, 0.1)
    wait_for_shards(tmp_path, 4)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole = 2 * len(shards(tmp_path))
    assert process.exitcode == -signal.SIGKILL and 8 <= whole < 40
    folder = EmbeddingCache(tmp_path, KEY).folder
    (folder / ".tmp-1").write_bytes(b"half a shard")
    rest = fill(tmp_path, MANY)
    assert right(rest.found, MANY) and rest.encoder.seen == MANY[whole:]
    assert not list(folder.glob(".tmp*"))


def test_two_processes_at_once_encode_each_text_once(tmp_path: Path) -> None:
    first, counted = child(tmp_path, 0.1)
    wait_for_shards(tmp_path, 1)  # it holds the lock
    second, also_counted = child(tmp_path, 0.0)
    assert counted.recv() == (40, False) and also_counted.recv() == (0, True)
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert len(shards(tmp_path)) == 20


def test_batches_are_filled_up() -> None:
    sizes = []

    class Sizes(Encoder):
        def encode(self, prompts: Sequence[str]) -> Conditioning:
            sizes.append(len(prompts))
            return super().encode(prompts)

    encoded = encode_prompts(Sizes(), [Prompt(text) for text in [*TEXTS, TEXTS[0]]], 4)  # type: ignore[arg-type]
    assert sizes == [4, 4, 4] and len(encoded) == 11
    cond, _ = encoded.select([10, 9], torch.device("cpu"))
    assert torch.equal(cond.positive["embeds"], torch.stack([embedding(TEXTS[i]) for i in (0, 9)]))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TILTFLOW_CACHE", "/scratch/t")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert embedding_cache("off") is None
    assert embedding_cache("~/mine") == Path("/home/me/mine")
    assert embedding_cache(None) == Path("/scratch/t/embeddings")
    monkeypatch.delenv("TILTFLOW_CACHE")
    assert embedding_cache(None) == Path("/caches/tiltflow/embeddings")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedding_cache(None) == Path("/home/me/.cache/tiltflow/embeddings")
