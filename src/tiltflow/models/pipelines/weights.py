"""A part's weight files held against the network that its configuration describes.

The network is built in shape only, and the files' headers are read: nothing loads. What the
libraries do by themselves is to draw a missing weight at random and to leave out one too many.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.sentences import first_sentence
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.headers import FLOATS, Entry

META = torch.device("meta")

HARMLESS = {
    "CLIP": re.compile(r"(text_model\.)?embeddings\.position_ids"),
    "Qwen3Model": re.compile(r"lm_head\.weight"),
    "T5Encoder": re.compile(r"decoder\..*|lm_head\.weight"),
}
"""By the beginning of a class's name, what its files may hold besides its weights: CLIP's positions
0, 1, 2, …, which older versions saved; of a whole T5 the half that is not the encoder; of a whole
language model its head."""

PREFIX = re.compile(r"^(text_model\.|model\.)?(language_model\.(model\.)?)?")
"""Before the names of a CLIP text model, in files of some versions and models of others; of a
language model without its head; and of one beside an eye, by the version that saved it."""


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers or transformers by its `_class_name`, in fp32, in shape only."""
    import diffusers
    import transformers

    values = {k: v for k, v in config.items() if not k.startswith("_")}
    name = str(config["_class_name"])
    kind = getattr(diffusers, name, None)
    with META:
        if kind is not None:
            model: nn.Module = kind.from_config(values)
        else:
            kind = getattr(transformers, name)
            model = kind(kind.config_class(**values))
    return model.to(META).requires_grad_(False).eval()


def check_weights(place: str | Path | Pipeline, parts: Sequence[str] | None = None) -> None:
    """Whether each network of a pipeline (or those of `parts`) has its weights and no others.

    The directory has passed `check_pipeline`. What has been looked at is not looked at again.

    Raises:
        ValueError: naming the folder and the weight that is missing, unknown, of another shape or
            no floating-point number; or if the configuration describes no such network.
    """
    pipeline = Pipeline.of(place)
    for part, kind in pipeline.networks.items():
        if (parts and part not in parts) or part in pipeline.held:
            continue
        folder, config = pipeline.root / part, {**pipeline.config(part), "_class_name": kind}
        known = _described(folder, json.dumps(config, sort_keys=True))
        _check_network(folder, kind, known, pipeline.header(part))
        pipeline.held.add(part)


@dataclass(frozen=True)
class Slot:
    """A tensor that a network has: its shape, whether it is of floating-point numbers, and which of
    the network's tensors it is: tied weights are one tensor by two names."""

    shape: tuple[int, ...]
    floating: bool
    tensor: int


@lru_cache(maxsize=64)
def _described(folder: Path, text: str) -> dict[str, Slot]:
    """What a network of this configuration holds, by names without `PREFIX`.

    Raises:
        ValueError: if its class makes nothing of it.
    """
    config = json.loads(text)
    try:
        network = meta_model(config)
    except Exception as error:  # whatever a configuration can make of two libraries
        raise ValueError(
            f"{folder / 'config.json'} describes no {config['_class_name']}: "
            f"{first_sentence(error)}"
        ) from error
    return {
        PREFIX.sub("", name): Slot(tuple(value.shape), value.is_floating_point(), id(value))
        for name, value in network.state_dict(keep_vars=True).items()
    }


def _check_network(
    folder: Path, kind: str, known: Mapping[str, Slot], found: Mapping[str, Entry]
) -> None:
    harmless = next((p for start, p in HARMLESS.items() if kind.startswith(start)), None)
    given = {
        PREFIX.sub("", name): entry
        for name, entry in found.items()
        if harmless is None or not harmless.fullmatch(name)
    }
    there = {known[name].tensor for name in given if name in known}
    # Of tied weights files hold the one or both.
    missing = [name for name, slot in known.items() if slot.tensor not in there]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{folder} holds {_first(unknown)}, which a {kind} does not use")
    if missing:
        raise ValueError(f"{folder} lacks the weight {_first(missing)}")
    for name, entry in sorted(given.items()):
        here = known[name].shape
        if here != entry.shape:
            raise ValueError(
                f"{folder} has another shape for {name}: {entry.shape} in the file, {here} by its "
                "config.json"
            )
        if known[name].floating and entry.dtype not in FLOATS:
            raise ValueError(
                f"{folder} holds {name} in {entry.dtype}, which is no floating-point type: give "
                "the model in fp32, bf16 or fp16"
            )


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def check_values(network: nn.Module, where: str) -> None:
    """Whether every weight and buffer is finite.

    One pass over memory that was read just now: 6 to 7 GB/s on one core.

    Raises:
        ValueError: naming the tensor and the value.
    """
    for name, value in network.state_dict().items():
        if value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        worst = largest(value)
        if not math.isfinite(worst):
            raise ValueError(f"{where} holds {name} with a value that is {worst}")


def largest(value: Tensor) -> float:
    """The largest of a tensor's absolute values, with no copy made; NaN where there is one."""
    low, high = (float(bound) for bound in torch.aminmax(value))
    return max(-low, high) if low == low else low
