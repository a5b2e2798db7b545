"""What a pipeline directory holds, checked before any weight loads and without diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltflow.core.disk import parse_json
from tiltflow.core.sentences import printable
from tiltflow.models.pipelines.headers import Entry, check_sizes, part_header
from tiltflow.models.pipelines.limits import check_numbers, is_number, shown

FAMILIES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2",
}
"""The pipeline classes that can be trained, and what this project calls their families."""

PARTS = {
    "sd3": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "flux": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "flux2": ("text_encoder", "tokenizer"),
}
"""Besides transformer, vae and scheduler: what a family has. SD3's text encoders may be absent, as
long as there is one: the index then has a null in their place."""

TOKEN_PATCH = {"sd3": 1, "flux": 2, "flux2": 1}
"""How many latent cells wide a token of the pipeline's own latents is (SD3's are no tokens)."""

SIDE_FILE = "tiltflow.json"
"""Beside model_index.json: call-time defaults that a pipeline directory cannot hold."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"]
HUB_FILES += ["README.md", "LICENSE*"]  # for the licence, which an export names

PART_NAME = re.compile(r"\w+")
SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")

LIBRARIES = ("diffusers", "transformers", "tiltflow.scheduler")
"""Where the classes of a pipeline's parts may come from; no code is taken from the directory."""

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "CPSFlowMatchScheduler")
"""A flow-matching model's own, and a student's."""

CLASSES = {
    "sd3": {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    "flux": {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    },
    "flux2": {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
    },
}
"""The networks that a family's pipeline is made of."""

INDEX = "model_index.json"
LARGEST_JSON = 32 * 2**20
"""Bytes: a tokenizer's vocabulary is 11 MB at most, and what is read takes 20 times as much."""
NUMBERED = ("config.json", "scheduler_config.json")
JSON_FILES = (*NUMBERED, "tokenizer_config.json", "tokenizer.json", "vocab.json")
TOKENIZER_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
"""The files that a tokenizer may consist of, besides its tokenizer_config.json."""


def check_pipeline(path: str | Path, family: str | None = None) -> str:
    """The family of the pipeline in directory `path`: "sd3", "flux" or "flux2".

    The mixture has no files: family "mixture", or the path "mixture" by itself, passes unchecked.

    Raises:
        ValueError: if there is no such directory, it holds no pipeline, one of another class than
            `family`, or one with files missing (all of them are listed) or broken.
    """
    if family == "mixture" or (family is None and str(path) == "mixture"):
        return "mixture"
    if family is not None and family not in FAMILIES.values():
        known = ", ".join([*FAMILIES.values(), "mixture"])
        raise ValueError(f"model.family {family!r} is none of {known}")
    root = Path(path)
    index = pipeline_index(root)
    name = index.get("_class_name")
    found = FAMILIES.get(str(name))
    if found is None:
        raise ValueError(f"{root} holds a {name}, which is none of {', '.join(FAMILIES)}")
    if family not in (None, found):
        raise ValueError(f"{root} holds a {name} (family {found}), not one of family {family}")
    missing = missing_files(root, index, found)
    scheduler = index.get("scheduler")
    if isinstance(scheduler, list) and scheduler[-1] not in (None, *SCHEDULERS):
        raise ValueError(f"{root} has a {scheduler[-1]}, but it needs a {SCHEDULERS[0]}")
    if missing:
        raise ValueError(f"{root} is not a complete {name}: {', '.join(missing)} missing")
    for part in parts_of(root, index, found):
        _check_class(root, index, part, found)
        for file in (root / part / name for name in JSON_FILES):
            content = read_json(file) if file.is_file() else {}
            if file.name in NUMBERED:
                check_numbers(file, content)
        if part.startswith(("transformer", "vae", "text_encoder")):
            check_sizes(root / part, read_json(root / part / "config.json"), read_part(root, part))
    check_numbers(root / INDEX, index)
    check_numbers(root / SIDE_FILE, side_file(root))
    _check_tokenizers(root, index, found)
    return found


def _check_class(root: Path, index: Mapping[str, Any], part: str, family: str) -> None:
    """Whether a part is what its family takes, by the index and by its own configuration."""
    wanted = CLASSES[family].get(part)
    if wanted is None:
        return
    config = read_json(root / part / "config.json")
    for file, name in (
        (INDEX, (index.get(part) or [None])[-1]),
        ("config", config.get("_class_name")),
    ):
        if name != wanted and not (file == "config" and name is None):
            where = root / INDEX if file == INDEX else root / part / "config.json"
            raise ValueError(f"{where} calls the {part} {shown(name)}, but it must be a {wanted}")


def _check_tokenizers(root: Path, index: Mapping[str, Any], family: str) -> None:
    """Whether the tokenizers have lengths, and CLIP's no more tokens than CLIP has positions."""
    for part in (name for name in index if name.startswith("tokenizer")):
        file = root / part / "tokenizer_config.json"
        if _is_null(index[part]) or not file.is_file():
            continue
        encoder = part.replace("tokenizer", "text_encoder")
        length = read_json(file).get("model_max_length")
        if not CLASSES[family].get(encoder, "").startswith("CLIP"):
            if length is not None and not (is_number(length) and length > 0):
                raise ValueError(f"{file} has model_max_length={shown(length)}, which is no length")
            continue
        positions = read_json(root / encoder / "config.json").get("max_position_embeddings", 77)
        if length is None:
            raise ValueError(
                f"{file} has no model_max_length, and prompts are padded to it: add the "
                f"{positions} of its text encoder"
            )
        if not is_number(length) or not 1 <= length <= positions:
            raise ValueError(
                f"{file} has model_max_length={shown(length)}, which is no length from 1 to the "
                f"{positions} positions of its text encoder"
            )


def pipeline_index(root: Path) -> dict[str, Any]:
    """model_index.json of a pipeline directory.

    Raises:
        ValueError: if there is no such directory or no readable index in it.
    """
    if not root.is_dir():
        raise ValueError(f"there is no directory {root}: download the model and give its path")
    if not (root / INDEX).is_file():
        raise ValueError(f"{root} holds no {INDEX}, so it is not a diffusers pipeline")
    return read_json(root / INDEX)


def parts_of(root: Path, index: Mapping[str, Any], family: str) -> list[str]:
    """The parts that the family cannot do without, and those that the index lists.

    Raises:
        ValueError: if the index lists a part of a class from elsewhere than diffusers and
            transformers, or one whose name is no folder name; or if it lists no text encoder.
    """
    needed = ["transformer", "vae", "scheduler"]
    for part in PARTS[family]:
        encoder = part.replace("tokenizer", "text_encoder")
        if family != "sd3" or not _is_null(index.get(encoder)):
            needed.append(part)
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or _is_null(value):
            continue
        if len(value) != 2 or value[0] not in LIBRARIES or not PART_NAME.fullmatch(name):
            raise ValueError(
                f"{root / INDEX} lists {name!r} as {value!r}, which is no class of "
                f"{' or '.join(LIBRARIES)}"
            )
        needed.append(name)
    if not any(part.startswith("text_encoder") for part in needed):
        raise ValueError(f"{root / INDEX} lists no text encoder: a pipeline needs one at least")
    return list(dict.fromkeys(needed))


def _is_null(entry: Any) -> bool:
    """Whether an entry of the index is that of a part which the pipeline was saved without."""
    return isinstance(entry, list) and not any(entry)


def missing_files(root: Path, index: Mapping[str, Any], family: str) -> list[str]:
    """The files, relative to `root`, that loading the pipeline would ask for in vain."""
    missing: list[str] = []
    for part in parts_of(root, index, family):
        folder = root / part
        wanted = _wanted(folder, part)
        missing += [f"{part}/{name}" for name in wanted if not (folder / name).is_file()]
        if not wanted and not folder.is_dir():
            missing.append(f"{part}/(the folder)")
    if family == "flux2" and not missing and not _has_chat_template(root / "tokenizer"):
        missing.append("tokenizer/chat_template.jinja")
    return missing


def _has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer can put a prompt into a chat, which klein's text encoder is given."""
    if (folder / "chat_template.jinja").is_file():
        return True
    return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))


def _wanted(folder: Path, part: str) -> list[str]:
    """The files that a part has to hold."""
    if part == "scheduler":
        return ["scheduler_config.json"]
    if part.startswith("tokenizer"):
        present = any(all((folder / n).is_file() for n in names) for names in TOKENIZER_FILES)
        return ["tokenizer_config.json", *([] if present else TOKENIZER_FILES[0])]
    if part in ("transformer", "vae"):
        return ["config.json", *weight_files(folder, "diffusion_pytorch_model")]
    if part.startswith("text_encoder"):
        return ["config.json", *weight_files(folder, "model")]
    return []


def weight_files(folder: Path, stem: str) -> list[str]:
    """The safetensors files that hold a part's weights: one, or the shards that its index names.

    Raises:
        ValueError: if the index is none, or names a file that is not a safetensors file beside it.
    """
    return sorted(set(_weight_map(folder, stem).values())) or [f"{stem}.safetensors"]


def _weight_map(folder: Path, stem: str) -> dict[str, str]:
    """The shards of a part's weights by name; empty where they are in one file."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file() or (folder / f"{stem}.safetensors").is_file():
        return {}
    content = read_json(index)
    table = content.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index} has no weight_map")
    for name in sorted(map(str, table.values())):
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{index} names {shown(name)}, which is no safetensors file beside it")
    if "metadata" not in content:
        raise ValueError(f"{index} has no metadata, which diffusers asks for")
    return {tensor: str(name) for tensor, name in table.items()}


def read_part(root: Path, part: str) -> dict[str, Entry]:
    """What the headers of a network's weight files say.

    Raises:
        ValueError: as `part_header`.
    """
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    listed = _weight_map(root / part, stem)
    return part_header(root / part, weight_files(root / part, stem), listed)


def local_pipeline(path: str | Path) -> Path:
    """A directory as it is; a hub id (`organisation/name`) downloaded, or taken from its cache.

    Raises:
        ValueError: if there is no such directory and the hub has no such pipeline.
    """
    if Path(path).exists() or not HUB_ID.fullmatch(str(path)):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except OSError as error:  # the hub's own errors, and having no connection
        raise ValueError(
            f"{path} is no directory, and could not be had from the hub: {printable(str(error))}"
        ) from error


def absent_parts(root: Path) -> dict[str, None]:
    """The parts that a pipeline was saved without, as `from_pretrained` must be told of them.

    diffusers takes a null in the index for a gap, unless the class calls the part optional, which
    SD3's does not call its text encoders.
    """
    return {name: None for name, value in pipeline_index(root).items() if _is_null(value)}


def side_file(root: Path) -> dict[str, Any]:
    """The call-time defaults beside a pipeline, or none."""
    file = root / SIDE_FILE
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file holds anything else, or is larger than any of a pipeline's.
    """
    if file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} is larger than {LARGEST_JSON // 2**20} MiB")
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return content
