"""A pipeline's networks out of its directory: whole ones, by safetensors, or an error."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from tiltflow.core.sentences import first_sentence
from tiltflow.models.pipelines.files import absent_parts, pipeline_index, read_json
from tiltflow.models.pipelines.weights import check_values, check_weights


def load_pipeline(
    pipeline_class: Any,
    path: str | Path,
    *,
    transformer_class: Any,
    encoders: tuple[str, ...],
    parts: str,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    empty: bool = False,
) -> Any:
    """The pipeline with its networks, on the CPU.

    `parts` "image" leaves text encoders and tokenizers out. "text" leaves the autoencoder out and
    gives the transformer without weights, for what an encoder has to know of its configuration.
    `empty` reads no weights of the transformer, see `load_part`.

    Raises:
        ValueError: if a part cannot be loaded, or its files do not hold its weights and no others,
            all of them finite.
    """
    root = Path(path)
    given: dict[str, Any] = dict(absent_parts(root))
    present = [name for name in encoders if name not in given]
    networks = {"text": [*present, "transformer"], "image": ["transformer", "vae"]}
    check_weights(root, networks.get(parts, [*present, "transformer", "vae"]))
    if parts == "image":
        given |= {name: None for part in present for name in (part, _tokenizer(part))}
    else:
        given |= {part: load_part(root, part, dtype) for part in present}
    if parts == "text":
        given |= {
            "vae": None,
            "transformer": _without_weights(root / "transformer", transformer_class),
        }
    else:
        given["transformer"] = load_part(root, "transformer", dtype, empty)
        given["vae"] = load_part(root, "vae", vae_dtype)
    try:
        return pipeline_class.from_pretrained(str(root), local_files_only=True, **given)
    except Exception as error:
        raise ValueError(f"{root} cannot be loaded: {first_sentence(error)}") from error


def load_part(root: Path, part: str, dtype: torch.dtype, empty: bool = False) -> nn.Module:
    """One network, frozen, of the class that the pipeline's index names.

    `empty` gives a diffusers model of `dtype` whose weights have no values yet: no file is read,
    and memory that nobody writes to is not taken.

    Raises:
        ValueError: if it cannot be loaded, or a weight is missing or of another shape (the
            libraries would put random numbers in its place), too many, or not finite.
    """
    library, name = pipeline_index(root)[part]
    if empty:
        return _without_values(root / part, getattr(importlib.import_module(library), name), dtype)
    try:
        network, info = getattr(importlib.import_module(library), name).from_pretrained(
            str(root),
            subfolder=part,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a directory can make of two libraries
        raise ValueError(f"{root / part} cannot be loaded: {first_sentence(error)}") from error
    for key in ("missing_keys", "mismatched_keys"):  # by names and shapes: `check_weights`
        wrong = sorted(map(str, info[key]))
        if wrong:
            raise ValueError(f"{root / part} cannot be loaded: {wrong[0]} did not go in")
    check_values(network, str(root / part))
    return network.requires_grad_(False).eval()


def _without_values(folder: Path, kind: Any, dtype: torch.dtype) -> nn.Module:
    network = _without_weights(folder, kind)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            module.register_parameter(name, made)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    return network.eval()


def _without_weights(folder: Path, kind: Any) -> nn.Module:
    with init_empty_weights():
        network: nn.Module = kind.from_config(read_json(folder / "config.json"))
    return network


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")
