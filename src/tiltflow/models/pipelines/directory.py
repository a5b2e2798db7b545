"""A pipeline directory: each of its files is read once, when it is first asked for.

One object is made where a command begins, and handed to whatever needs the directory. What it has
read it keeps, so it is for one command, and never for another process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tiltflow.core.disk import parse_json
from tiltflow.core.paths import resolve_path
from tiltflow.core.sentences import printable
from tiltflow.models.family import (
    HOW_TO_ADD,
    Family,
    family_named,
    family_of_class,
    pipeline_classes,
)
from tiltflow.models.pipelines.headers import Entry, part_header
from tiltflow.models.pipelines.limits import is_number, shown

INDEX = "model_index.json"
SIDE_FILE = "tiltflow.json"
"""Beside model_index.json: call-time defaults that a pipeline directory cannot hold."""

LARGEST_JSON = 32 * 2**20
"""Bytes: a tokenizer's vocabulary is 11 MB at most, and what is read takes 20 times as much."""

SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
INDEX_END = ".index.json"
"""After the name of a single weight file: the index of shards that are in its place."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"]
HUB_FILES += ["README.md", "LICENSE*"]  # for the licence, which an export names


class Pipeline:
    """A directory that a diffusers pipeline was saved to.

    Args:
        root: the directory.
        asked: the family that it should be of, by name or as `module:RECORD`; None reads it off.
    """

    def __init__(self, root: str | Path, asked: str | None = None) -> None:
        self.root = Path(root)
        self.asked = asked
        self.checked = False
        """Whether `files.check_directory` has passed."""
        self.held: set[str] = set()
        """The parts whose headers were held against their networks (`weights.check_weights`)."""
        self._json: dict[str, dict[str, Any]] = {}
        self._headers: dict[str, dict[str, Entry]] = {}

    @classmethod
    def of(cls, place: str | Path | Pipeline, asked: str | None = None) -> Pipeline:
        """A path opened, or what is open already."""
        return place if isinstance(place, Pipeline) else cls(place, asked)

    def __str__(self) -> str:
        return str(self.root)

    def json(self, name: str) -> Mapping[str, Any]:
        """A JSON object by its place in the directory.

        Raises:
            ValueError: as `read_json`.
        """
        if name not in self._json:
            self._json[name] = read_json(self.root / name)
        return self._json[name]

    @property
    def index(self) -> Mapping[str, Any]:
        """model_index.json.

        Raises:
            ValueError: if there is no such directory or no readable index in it.
        """
        if INDEX not in self._json:
            if not self.root.is_dir():
                raise ValueError(
                    f"there is no directory {self.root}: download the model and give its path"
                )
            if not (self.root / INDEX).is_file():
                raise ValueError(f"{self.root} holds no {INDEX}, so it is not a diffusers pipeline")
        return self.json(INDEX)

    @cached_property
    def family(self) -> Family:
        """By the index's class.

        Raises:
            ValueError: if it is of no family here, or of another than was asked for.
        """
        wanted = None if self.asked is None else family_named(self.asked)
        name = str(self.index.get("_class_name"))
        if wanted is not None and wanted.pipeline == name:
            return wanted
        found = family_of_class(name)
        if found is None:
            raise ValueError(f"{self.root} holds a {none_of(name)}")
        if wanted is not None:
            raise ValueError(
                f"{self.root} holds a {name} (family {found.name}), not one of family {wanted.name}"
            )
        return found

    @cached_property
    def absent(self) -> dict[str, None]:
        """The parts that it was saved without, as `from_pretrained` must be told of them; none
        where there is no directory.

        diffusers takes a null in the index for a gap, unless the class calls the part optional,
        which SD3's does not call its text encoders.
        """
        if not self.root.is_dir():
            return {}
        return {name: None for name, value in self.index.items() if is_null(value)}

    @property
    def absent_encoders(self) -> tuple[str, ...]:
        """Of these, the text encoders: a prompt's conditioning goes by which there are."""
        return tuple(sorted(part for part in self.absent if part.startswith("text_encoder")))

    @property
    def side(self) -> Mapping[str, Any]:
        """The call-time defaults beside the pipeline, or none."""
        return self.json(SIDE_FILE) if (self.root / SIDE_FILE).is_file() else {}

    @property
    def flags(self) -> Mapping[str, Any]:
        """What the index holds beside parts: arguments of the pipeline's own, such as whether it
        was distilled, or which layers of a text encoder it reads."""
        own = ((key, value) for key, value in self.index.items() if not key.startswith("_"))
        return {key: value for key, value in own if not is_part(value)}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.root / name).is_file()

    def config(self, part: str) -> Mapping[str, Any]:
        """A network's configuration as it was saved."""
        return self.json(f"{part}/config.json")

    @property
    def networks(self) -> dict[str, str]:
        """The networks that the index lists, each with its class."""
        return {
            part: str(entry[1])
            for part, entry in self.index.items()
            if is_part(entry) and any(entry) and is_network(part)
        }

    def weight_files(self, part: str) -> list[str]:
        """The safetensors files that loading a part reads: one, or the shards that its index names.

        Raises:
            ValueError: if the index is none, or it or the part's configuration names a file that is
                not a safetensors file beside it.
        """
        return sorted(set(self._shards(part).values())) or [self._loaded(part)]

    def header(self, part: str) -> Mapping[str, Entry]:
        """What the headers of a network's weight files say.

        Raises:
            ValueError: as `part_header`.
        """
        if part not in self._headers:
            listed = self._shards(part)
            self._headers[part] = part_header(self.root / part, self.weight_files(part), listed)
        return self._headers[part]

    def both_kinds(self, part: str) -> bool:
        """Whether a part has an index of shards and a single file, of which one is not read."""
        single = f"{part}/{stem(part)}.safetensors"
        return self.has(single) and self.has(single + INDEX_END)

    def _loaded(self, part: str) -> str:
        """The name of what is opened for a part's weights: a single file or an index of shards.

        A model that was saved over another may leave both, old and new. diffusers (0.42) then
        takes the index, and transformers (5.23) the single file, or what its configuration names.

        Raises:
            ValueError: if the configuration names something else than such a file.
        """
        single = f"{stem(part)}.safetensors"
        index = single + INDEX_END
        if not is_encoder(part):
            return index if self.has(f"{part}/{index}") else single
        named = None
        if self.has(f"{part}/config.json"):
            named = self.config(part).get("transformers_weights")
        if named is not None:
            if not SHARD_NAME.fullmatch(str(named).removesuffix(INDEX_END)):
                raise ValueError(
                    f"{self.root / part / 'config.json'} has transformers_weights={shown(named)}, "
                    "which is no safetensors file beside it"
                )
            return str(named)
        alone = self.has(f"{part}/{index}") and not self.has(f"{part}/{single}")
        return index if alone else single

    def _shards(self, part: str) -> dict[str, str]:
        """The shards of a part's weights by name; empty where they are in one file."""
        name = f"{part}/{self._loaded(part)}"
        index = self.root / name
        if not name.endswith(INDEX_END) or not index.is_file():
            return {}
        content = self.json(name)
        table = content.get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{index} has no weight_map")
        for shard in sorted(map(str, table.values())):
            if not SHARD_NAME.fullmatch(shard):
                raise ValueError(
                    f"{index} names {shown(shard)}, which is no safetensors file beside it"
                )
        if "metadata" not in content:
            raise ValueError(f"{index} has no metadata, which diffusers asks for")
        return {tensor: str(shard) for tensor, shard in table.items()}


class Pipelines:
    """The directories that a command works on: the model's, and its generator's if it has one.

    A hub id becomes a directory when it is asked for, and not before.
    """

    def __init__(self, model: str, generator: str | None = None, family: str | None = None) -> None:
        """`model` and `generator` are as a recipe has them (`model.path`, `generator_path`)."""
        self._places = {"model": model, "generator": generator}
        self._family = family

    @cached_property
    def model(self) -> Pipeline:
        """The model's.

        Raises:
            ValueError: as `local_pipeline`.
        """
        return self._open("model")

    @cached_property
    def generator(self) -> Pipeline | None:
        """The one that the generator starts from.

        Raises:
            ValueError: as `local_pipeline`.
        """
        return None if self._places["generator"] is None else self._open("generator")

    @property
    def base(self) -> Pipeline:
        """The one that the student's weights belong to."""
        return self.generator or self.model

    def here(self, key: str) -> Pipeline | None:
        """The "model" or "generator" where it is on this machine already."""
        place = self._places[key]
        if place is None or not Path(resolve_path(place)).exists():
            return None
        return self.model if key == "model" else self.generator

    def _open(self, key: str) -> Pipeline:
        place = self._places[key]
        assert place is not None
        return Pipeline(local_pipeline(resolve_path(place)), self._family)


def none_of(name: str) -> str:
    """The end of the sentence on a pipeline class that is nobody's here."""
    return f"{name}, which is none of {', '.join(pipeline_classes())}; {HOW_TO_ADD}"


def stem(part: str) -> str:
    """What a network's weight files are called."""
    return "model" if is_encoder(part) else "diffusion_pytorch_model"


def is_encoder(part: str) -> bool:
    """Whether a part is a text encoder, which transformers saves and loads; the other networks are
    diffusers' own."""
    return part.startswith("text_encoder")


def is_network(part: str) -> bool:
    return part in ("transformer", "vae") or is_encoder(part)


def is_part(entry: Any) -> bool:
    """Whether an entry of the index is a part: a list of a library and a class. A list of numbers
    is an argument of the pipeline's own."""
    return isinstance(entry, list) and not (entry and all(is_number(value) for value in entry))


def is_null(entry: Any) -> bool:
    """Whether an entry of the index is that of a part which the pipeline was saved without."""
    return is_part(entry) and not any(entry)


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


def absent_parts(root: str | Path) -> dict[str, None]:
    """`Pipeline.absent` of a directory."""
    return Pipeline(root).absent


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
