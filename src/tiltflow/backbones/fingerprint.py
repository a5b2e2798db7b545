"""What a pipeline's embeddings depend on, read off its files without loading a weight."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from tiltflow.backbones.files import pipeline_index, read_json, side_file, weight_files
from tiltflow.disk import sha256

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers")


def encoder_facts(
    root: Path,
    *,
    dtype: str,
    device: str,
    max_sequence_length: int | None,
    batch_size: int,
) -> dict[str, str | int | None]:
    """Settings, library versions, and the checksum of every file of text encoders and tokenizers.

    `device` is a kind of device: two kinds round differently, two of one kind are taken to be
    alike. So does a batch of another size.
    """
    if max_sequence_length is None:
        max_sequence_length = side_file(root).get("max_sequence_length")
    # In the place of an encoder that SD3 lacks are zeros, as many as the transformer takes.
    transformer = read_json(root / "transformer" / "config.json")
    widths = ("joint_attention_dim", "pooled_projection_dim")
    facts: dict[str, str | int | None] = {
        "dtype": dtype,
        "device": device,
        "max_sequence_length": max_sequence_length,
        "batch size": batch_size,
        **{name: transformer[name] for name in widths if name in transformer},
        **{f"{name} version": version(name) for name in LIBRARIES},
    }
    for part, entry in sorted(pipeline_index(root).items()):
        if part == "_class_name":
            facts[part] = str(entry)
        elif part.startswith(("text_encoder", "tokenizer")):
            facts[part] = str(entry)
            for file in _files(root / part):
                facts[f"{part}/{file.name}"] = sha256(file)
    return facts


def _files(folder: Path) -> list[Path]:
    """The files of a part that loading it reads; none if the part is absent."""
    if not folder.is_dir():
        return []
    if folder.name.startswith("tokenizer"):
        return sorted(file for file in folder.iterdir() if file.is_file())
    return [folder / name for name in ("config.json", *weight_files(folder, "model"))]
