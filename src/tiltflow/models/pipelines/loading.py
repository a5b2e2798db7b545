"""A pipeline's networks out of its directory: whole ones, by safetensors, or an error."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

from tiltflow.core.sentences import first_sentence
from tiltflow.models.backbone import Loading
from tiltflow.models.pipelines.directory import Pipeline, is_part
from tiltflow.models.pipelines.weights import check_values, check_weights
from tiltflow.models.pipelines.words import check_text_packages, processors_of, tokenizer


def no_bars() -> None:
    """Has the libraries draw no bars of their own: what a command says of its work is its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def load_pipeline(pipeline: Pipeline, loading: Loading) -> Any:
    """The pipeline with its networks, on the CPU.

    `loading.parts` "image" leaves text encoders and tokenizers out. "text" leaves the autoencoder
    out and gives the transformer without weights, for what an encoder has to know of its
    configuration. `loading.base` "empty" reads no weights of the transformer, see `load_part`.

    Raises:
        ValueError: if a part cannot be loaded, or its files do not hold its weights and no others,
            all of them finite; or as `check_text_packages`.
    """
    import diffusers

    parts, dtype = loading.parts, loading.dtype
    no_bars()
    family, given = pipeline.family, dict[str, Any](pipeline.absent)
    present = [name for name in family.text_encoders if name not in given]
    words: dict[str, Any] = {}
    if parts != "image":
        check_text_packages(family)
    networks = {"text": [*present, "transformer"], "image": ["transformer", "vae"]}
    check_weights(pipeline, networks.get(parts, [*present, "transformer", "vae"]))
    if parts == "image":
        given |= {name: None for part in present for name in (part, _tokenizer(part))}
        given |= processors_of(pipeline, silent=True)
    else:
        given |= {part: load_part(pipeline, part, dtype) for part in present}
        words = _words(pipeline)
        given |= dict.fromkeys(words)  # diffusers would look for the processor's class
        given |= processors_of(pipeline, silent=False)
    if parts == "text":
        given |= {
            "vae": None,
            "transformer": _without_weights(pipeline, "transformer"),
        }
    else:
        given["transformer"] = load_part(pipeline, "transformer", dtype, loading.base == "empty")
        given["vae"] = load_part(pipeline, "vae", loading.vae_dtype or dtype)
    kind = getattr(diffusers, str(family.pipeline))
    try:
        pipe = kind.from_pretrained(str(pipeline.root), local_files_only=True, **given)
    except Exception as error:
        raise ValueError(f"{pipeline} cannot be loaded: {first_sentence(error)}") from error
    for part, words_of in words.items():
        setattr(pipe, part, words_of)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_part(pipeline: Pipeline, part: str, dtype: torch.dtype, empty: bool = False) -> nn.Module:
    """One network, frozen, of the class that the pipeline's index names.

    `empty` gives a diffusers model of `dtype` whose weights have no values yet: no file is read,
    and memory that nobody writes to is not taken.

    Raises:
        ValueError: if it cannot be loaded, or a weight is missing or of another shape (the
            libraries would put random numbers in its place), too many, or not finite.
    """
    folder = pipeline.root / part
    if empty:
        return _without_values(pipeline, part, dtype)
    try:
        network, info = _class_of(pipeline, part).from_pretrained(
            str(pipeline.root),
            subfolder=part,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a directory can make of two libraries
        raise ValueError(f"{folder} cannot be loaded: {first_sentence(error)}") from error
    for key in ("missing_keys", "mismatched_keys"):  # by names and shapes: `check_weights`
        wrong = sorted(map(str, info[key]))
        if wrong:
            raise ValueError(f"{folder} cannot be loaded: {wrong[0]} did not go in")
    check_values(network, str(folder))
    return network.requires_grad_(False).eval()


def _words(pipeline: Pipeline) -> dict[str, Any]:
    """The tokenizers of processors, which are for pictures too and may ask for more libraries."""
    parts = [
        name
        for name, entry in pipeline.index.items()
        if is_part(entry) and name.startswith("tokenizer") and str(entry[-1]).endswith("Processor")
    ]
    return {part: tokenizer(pipeline, part) for part in parts}


def _class_of(pipeline: Pipeline, part: str) -> Any:
    library, name = pipeline.index[part]
    return getattr(importlib.import_module(library), name)


def _without_values(pipeline: Pipeline, part: str, dtype: torch.dtype) -> nn.Module:
    network = _without_weights(pipeline, part)
    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for place, module in network.named_modules():
        kept = partial(_kept_in, exact, place, dtype)
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=kept(name))
            made = nn.Parameter(values, requires_grad=False)
            module.register_parameter(name, made)
        for name, buffer in module.named_buffers(recurse=False):
            # one that no file holds is as its module made it, here as where files are read
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(kept(name)))
    return network.eval()


def _kept_in(exact: set[str], place: str, dtype: torch.dtype, name: str) -> torch.dtype:
    """fp32 of a tensor that is, or lies in, one of the `exact`; as diffusers loads it."""
    return torch.float32 if exact & {*place.split("."), name} else dtype


def _without_weights(pipeline: Pipeline, part: str) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights():
        network: nn.Module = _class_of(pipeline, part).from_config(dict(pipeline.config(part)))
    return network


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")
