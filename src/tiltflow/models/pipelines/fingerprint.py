"""What a pipeline's embeddings depend on, and which weights it holds, read off its files without
loading a weight; and which weights an adapter holds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.core.disk import sha256
from tiltflow.models.family import own_place
from tiltflow.models.pipelines.directory import Pipeline

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers")

WHOLE = 64 * 2**20
"""Bytes up to which a weight file's fingerprint is that of every byte."""
HEADER = 100_000_000
"""The most bytes that safetensors allows a header."""
WORDS = ("tokenizer", "processor")
"""How the names of parts begin that make tokens of prompts."""
BLOCKS, BLOCK = 64, 2**20
"""Of a larger file, so many blocks of so many bytes, evenly spaced from the first to the last."""


def encoder_facts(
    pipeline: Pipeline,
    *,
    dtype: str,
    device: str,
    max_sequence_length: int | None,
    batch_size: int,
) -> dict[str, str | int | None]:
    """Settings, library versions, the checksum of every file of text encoders and tokenizers, and
    of a family that is not builtin its code (of builtin ones `embedding_cache.FORMAT` counts).

    `device` is a kind of device: two kinds round differently, two of one kind are taken to be
    alike. So does a batch of another size.
    """
    if max_sequence_length is None:
        max_sequence_length = pipeline.side.get("max_sequence_length")
    # In the place of an encoder that SD3 lacks are zeros, as many as the transformer takes.
    transformer = pipeline.config("transformer")
    widths = ("joint_attention_dim", "pooled_projection_dim")
    facts: dict[str, str | int | None] = {
        "dtype": dtype,
        "device": device,
        "max_sequence_length": max_sequence_length,
        "batch size": batch_size,
        **{name: transformer[name] for name in widths if name in transformer},
        **{f"{name} version": version(name) for name in LIBRARIES},
        **{f"{name} version": _installed(name) for name in pipeline.family.text_packages},
    }
    for part, entry in sorted(pipeline.index.items()):
        if part == "_class_name":
            facts[part] = str(entry)
        elif part.startswith(("text_encoder", *WORDS)):
            facts[part] = str(entry)
            for file in _files(pipeline, part):
                facts[f"{part}/{file.name}"] = sha256(file)
    return facts | family_facts(pipeline)


def _installed(package: str) -> str | None:
    """A package's version; None where it is not there, which is said when it is needed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def family_facts(pipeline: Pipeline) -> dict[str, str]:
    """What tells the family that a pipeline is read as from every other: the place of its record,
    and the checksums of the modules that its class is made of, without what they import. Empty for
    a builtin family, whose class is the pipeline's.

    Raises:
        ValueError: as `Pipeline.family`, or if the class cannot be imported.
    """
    place = own_place(pipeline.asked, str(pipeline.index.get("_class_name")))
    if place is None:
        return {}
    return {"family": place, **_code(pipeline.family.backbone_class(), place)}


@functools.cache
def _code(kind: type, place: str) -> Mapping[str, str]:
    """Of the modules of a class, of its bases and of a record. Taken once for each class, because a
    file that is edited later is not what this process runs; a module that is loaded again makes
    another class.

    A module without a file (a notebook's) counts as another one each time: what it held before is
    not known.
    """
    modules = {place.partition(":")[0], *(base.__module__ for base in kind.__mro__)}
    known = {"tiltflow", *sys.stdlib_module_names} - {"__main__"}
    own = sorted(name for name in modules if name.partition(".")[0] not in known)
    files = {name: Path(getattr(sys.modules.get(name), "__file__", None) or "") for name in own}
    return {
        f"code of {name}": sha256(file) if file.is_file() else uuid.uuid4().hex
        for name, file in files.items()
    }


def _files(pipeline: Pipeline, part: str) -> list[Path]:
    """The files of a part that loading it reads; none if the part is absent."""
    folder = pipeline.root / part
    if not folder.is_dir():
        return []
    if part.startswith(WORDS):
        return sorted(file for file in folder.iterdir() if file.is_file())
    return [folder / name for name in ("config.json", *pipeline.weight_files(part))]


def pipeline_fingerprint(place: str | Path | Pipeline) -> str:
    """64 hexadecimal digits for the weights that a pipeline directory trains and decodes with.

    They depend on the contents of transformer and vae (configuration and weight files), on the
    pipeline's class and on the scheduler's configuration, not on where the directory lies or on
    which version of diffusers wrote it. A weight file beyond `WHOLE` bytes counts by its size, its
    header and `BLOCKS` blocks; so another file of the same shapes is told apart, and a single
    changed number in 20 GB may not be.

    Raises:
        ValueError: if a file that loading needs is not there, or is no JSON object.
    """
    pipeline = Pipeline.of(place)
    facts: dict[str, object] = {"class": pipeline.index.get("_class_name")}
    facts["scheduler"] = _settings(pipeline, "scheduler/scheduler_config.json")
    for part in ("transformer", "vae"):
        facts |= _part_facts(pipeline, part)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def encoders_fingerprint(pipeline: Pipeline) -> str | None:
    """64 hexadecimal digits for a pipeline's text encoders, as `pipeline_fingerprint` takes them;
    None where there are none, as beside a cache of embeddings."""
    facts: dict[str, object] = {}
    for part in sorted(pipeline.index):
        if part.startswith("text_encoder") and (pipeline.root / part).is_dir():
            facts |= _part_facts(pipeline, part)
    if not facts:
        return None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _part_facts(pipeline: Pipeline, part: str) -> dict[str, object]:
    facts: dict[str, object] = {part: _settings(pipeline, f"{part}/config.json")}
    for name in pipeline.weight_files(part):
        facts[f"{part}/{name}"] = content_digest(pipeline.root / part / name)
    return facts


def _settings(pipeline: Pipeline, name: str) -> dict[str, object]:
    """A part's configuration without the notes of the library that wrote it."""
    if not pipeline.has(name):
        raise ValueError(f"{pipeline.root / name} is missing")
    return {
        k: v for k, v in pipeline.json(name).items() if k == "_class_name" or not k.startswith("_")
    }


def files_fingerprint(place: Path) -> str:
    """64 hexadecimal digits for a file, or for all files of a folder by their names in it; large
    ones count as `pipeline_fingerprint` says."""
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
    facts = {str(file.relative_to(place)): content_digest(file) for file in files}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def content_digest(file: Path) -> str:
    """64 hexadecimal digits for a file of weights, as `pipeline_fingerprint` takes it.

    Raises:
        ValueError: if there is none.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    size = os.path.getsize(file)
    if size <= WHOLE:
        return sha256(file)
    digest = hashlib.sha256(f"{size}\n".encode())
    with file.open("rb") as opened:
        start = opened.read(8)
        digest.update(start)
        digest.update(opened.read(min(int.from_bytes(start, "little"), HEADER)))
        for i in range(BLOCKS):
            opened.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def adapter_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits for named tensors: their names, types, shapes and every bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
