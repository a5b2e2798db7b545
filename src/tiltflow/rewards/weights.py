"""Where a reward's weights come from: a local file or directory, or a repository of the hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.core.paths import resolve_path
from tiltflow.core.sentences import first_sentence, printable
from tiltflow.models.pipelines.weights import check_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHOWN_KEYS = 3
COMPUTED = re.compile(r"(.*\.)?(position_ids|relative_position_index)|criterion\..*")
"""What is no weight: positions, which older versions of the library saved, and a loss's."""


def absent(what: str, path: str, error: BaseException) -> str:
    """That there is no `what` at `path`; of a hub id also why none came from there."""
    sentence = f"there is no {what} at {path!r}"
    if Path(resolve_path(path)).exists():
        return sentence
    return f"{sentence}, and the hub gave none ({printable(first_sentence(error))})"


def weights_file(path: str, filename: str) -> Path:
    """The file at `path`: itself, `filename` in the directory, or `filename` of the hub id.

    Raises:
        ValueError: if there is no such file, and the hub has none either.
    """
    place = Path(resolve_path(path))
    if place.is_file():
        return place
    if place.is_dir():
        if not (place / filename).is_file():
            raise ValueError(f"there is no {filename} in {path}")
        return place / filename
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{path} is no file, and {filename} could not be had from the hub: "
            f"{printable(str(error))}"
        ) from error


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a PyTorch one, where nothing but tensors loads.

    A dictionary under `state_dict` or `model`, where checkpoints put it, is taken out.

    Raises:
        ValueError: if the file holds no tensors by name, or anything that only unpickling loads.
    """
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file can make of the restricted reader
        raise ValueError(f"{file} cannot be read as a file of weights and nothing else") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{file} does not hold tensors by name")
    return dict(content)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Loads `state` into the module, which must want these keys and shapes and no others.

    Raises:
        ValueError: naming the first missing, unknown or misshapen keys of `what`, or one with a
            value that is not finite.
    """
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    check_keys(shapes, state, what)
    module.load_state_dict(dict(state))
    check_values(module, what)


def check_keys(shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError unless `state` has the keys and shapes of `shapes` and no others."""
    missing = [key for key in shapes if key not in state]
    unknown = [key for key in state if key not in shapes]
    wrong = [key for key in shapes if key in state and shapes[key] != state[key].shape]
    for keys, problem in ((missing, "lacks"), (unknown, "does not know"), (wrong, "misshapes")):
        if keys:
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            raise ValueError(f"{what} {problem} {', '.join(keys[:SHOWN_KEYS])}{more}")


def from_state(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A transformers model of this configuration with exactly these weights, without drawing
    random ones first.

    Raises:
        ValueError: naming the first missing, unknown or misshapen keys of `what`, or one with a
            value that is not finite.
    """
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in kind(config).state_dict().items()}
    check_keys(shapes, state, what)
    model: Any = kind
    made = model.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype)
    check_values(made, what)
    loaded: PreTrainedModel = made
    return loaded


def load_pretrained(
    kind: type[PreTrainedModel], path: str, what: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A transformers model from safetensors at a directory or hub id, with its weights and no
    others: the library would go on with random ones, and leave out what it does not know.

    Raises:
        ValueError: if there is no `what` at `path`, or it lacks a weight, holds one too many, or
            one that is not finite.
    """
    model: Any = kind
    try:
        loaded, info = model.from_pretrained(
            resolve_path(path), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(absent(what, path, error)) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the {what} at {path!r} cannot be loaded ({first_sentence(error)})"
        ) from error
    missing, unknown = (
        sorted(key for key in map(str, info[keys]) if not COMPUTED.fullmatch(key))
        for keys in ("missing_keys", "unexpected_keys")
    )
    if missing:
        raise ValueError(f"the {what} at {path!r} lacks {missing[0]}")
    if unknown:
        raise ValueError(f"the {what} at {path!r} holds {unknown[0]}, which it does not use")
    check_values(loaded, f"the {what} at {path!r}")
    made: PreTrainedModel = loaded
    return made


def frozen(module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """The module without gradients and dropout, on the device in the given precision."""
    return module.requires_grad_(False).eval().to(device, dtype)


def dtype_of(name: str) -> torch.dtype:
    """The precision of an option `dtype`.

    Raises:
        ValueError: if it is neither "fp32" nor "bf16".
    """
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it is one of {', '.join(DTYPES)}")
    return DTYPES[name]


def scoring_mlp(width: int) -> nn.Sequential:
    """Five linear layers, width → 1024 → 128 → 64 → 16 → 1, and nothing between them.

    The head of both the LAION aesthetic predictor (`simple_inference.py` of
    christophschuhmann/improved-aesthetic-predictor) and ImageReward (`ImageReward.py` of
    THUDM/ImageReward). Theirs have dropout in between, which shows in the layers' numbers.
    """
    sizes = (width, 1024, 128, 64, 16, 1)
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    empty = nn.Identity
    return nn.Sequential(
        linear[0], empty(), linear[1], empty(), linear[2], empty(), linear[3], linear[4]
    )
