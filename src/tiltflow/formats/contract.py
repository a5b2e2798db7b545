"""What a student was trained for, carried by its export: in each LoRA file's header, under
`tiltflow`, and as contract.json beside the weights. `tiltflow sample` has its defaults there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from tiltflow.core.paths import PACKAGED
from tiltflow.core.settings import Steps, plain
from tiltflow.core.sizes import Resolution, said
from tiltflow.models.lora_files import lora_file
from tiltflow.models.pipelines.directory import HUB_ID

CONTRACT_FILE = "contract.json"
CONTRACT_KEY = "tiltflow"
"""The entry of a safetensors header that holds the contract as JSON."""
LARGEST = 2**20
"""Bytes of a contract.json, or of a base model's README.md, that are read."""
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt")
LIBRARIES = ("tiltflow", "torch", "diffusers", "peft")

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+$")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_LICENCE = re.compile(r"^license(?P<what>_name|_link)?:[ \t]*(?P<value>\S.*?)[ \t]*$", re.MULTILINE)


Side = Annotated[int, Field(ge=1, le=16_384)]
Size = Side | tuple[Side, Side] | tuple[Side, Side, Side]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Licence(_Part):
    """As the hub's front matter has it: `id` such as apache-2.0 or other, then a name, a link."""

    id: str
    name: str | None = None
    link: str | None = None


class BaseModelFacts(_Part):
    """The pipeline that the student's weights belong to. `hash` is `pipeline_fingerprint`'s.

    `hub_id` is known where it came from the hub; `packaged` is the name of one in this package.
    """

    name: str
    hub_id: str | None = None
    packaged: str | None = None
    hash: str
    licence: Licence | None = None


class AdapterFacts(_Part):
    """An exported LoRA: α was `trained_alpha` in training, and is the rank in the file; `hash` is
    `adapter_fingerprint`'s of the file's weights."""

    rank: Annotated[int, Field(ge=1)]
    trained_alpha: float
    hash: str | None = None


class Contract(_Part):
    """`steps` is K, or of a student of several the most of them, and `several` all of these;
    `sigmas` are K's levels σ₀ > … > σ_K = 0; `guidance` is the student's own, 1.0 for one pass
    without; `resolution` the side of a square in pixels, or height and width, or those behind
    the frames of a video, and of a student of several sizes that of its call by default; `sizes`
    are then all of them, and `sized_sigmas`, by size, the levels at those where they are others;
    `dtype` is that of the base in training; `recipe` the settings worth telling."""

    format: Literal["tiltflow-contract-1"] = "tiltflow-contract-1"
    stage: Literal["cold_start", "tilt"]
    family: str
    pipeline: str
    base: BaseModelFacts
    steps: Steps
    several: tuple[Steps, ...] = ()
    sigmas: tuple[float, ...]
    eta: Annotated[float, Field(ge=0, le=1)]
    guidance: float
    resolution: Size
    sizes: tuple[Size, ...] = ()
    sized_sigmas: dict[str, tuple[float, ...]] = {}
    max_sequence_length: Annotated[int, Field(ge=0, le=100_000)]
    dtype: Literal["fp32", "bf16"]
    vae_dtype: Literal["fp32", "bf16"] | None = None
    """The autoencoder's in training, where the recipe says it; None is `dtype`."""
    adapters: dict[str, AdapterFacts] = {}
    weights: str | None = None
    """`adapter_fingerprint`'s of full copies' weights as they were trained; None of adapters."""
    absent: tuple[str, ...] | None = None
    """The text encoders that the pipeline was without in training; None of an earlier version's,
    which does not say."""
    tilt: float | None = None
    """The strength at which stage 2 was merged; None in LoRA folders."""
    recipe: dict[str, Any] = {}
    versions: dict[str, str] = {}

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The numbers of steps that it was trained for, the smallest first."""
        return self.several or (self.steps,)

    @property
    def trained_sizes(self) -> tuple[Resolution, ...]:
        """The sizes that it was trained for, the most frequent first."""
        return self.sizes or (self.resolution,)

    @property
    def hashes(self) -> dict[str, str | None]:
        """The fingerprint of each adapter by name, as far as it is known."""
        return {name: facts.hash for name, facts in self.adapters.items()}

    @property
    def kept_in(self) -> dict[str, Literal["fp32", "bf16"]]:
        """The precision of a merged pipeline's parts, as diffusers takes it: one of all others."""
        return {"default": self.dtype, "vae": self.vae_dtype or self.dtype}

    def levels(self, steps: int, size: Resolution) -> tuple[float, ...] | None:
        """The levels σ₀ > … > σ_K = 0 that it was trained at, in `steps` steps at `size`; None
        where the contract does not say them."""
        if steps != self.steps or size not in self.trained_sizes:
            return None
        found = self.sized_sigmas.get(said(size), self.sigmas)
        return found if len(found) == steps + 1 and falling(found) else None

    def text(self) -> str:
        """The JSON of contract.json and of the header."""
        return self.model_dump_json(indent=1)


def falling(levels: Sequence[float]) -> bool:
    """Whether noise levels fall from 1 at most to 0, each below the one before."""
    return all(now > then for now, then in pairwise(levels)) and levels[-1] == 0 and levels[0] <= 1


def read_contract(folder: Path) -> Contract | None:
    """The contract of a LoRA folder or of a merged pipeline; None where there is none.

    Raises:
        ValueError: if there is one that cannot be read, or the folder of a LoRA holds none.
    """
    if (folder / "model_index.json").is_file():
        file = folder / CONTRACT_FILE
        if not file.is_file():
            return None
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file} is larger than {LARGEST} bytes, so it is no contract")
        return parse_contract(file.read_bytes(), str(file))
    file = lora_file(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(CONTRACT_KEY)
    except SafetensorError as error:
        raise ValueError(f"{file} is torn or no safetensors file ({error})") from error
    return None if text is None else parse_contract(text.encode(), str(file))


def merged_tilts(folders: Sequence[Path]) -> dict[str, float | None]:
    """Those folders of an export that are merged pipelines, by name, each with the strength of the
    tilt that is merged into it; None of a student that has none apart."""
    merged = [folder for folder in folders if (folder / "model_index.json").is_file()]
    return {folder.name: made.tilt for folder in merged if (made := read_contract(folder))}


def parse_contract(text: bytes, place: str) -> Contract:
    """A contract out of its JSON, found at `place`.

    Raises:
        ValueError: naming the first entry that is wrong.
    """
    try:
        return Contract.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{place} has a contract that cannot be read ({where}: {plain(first['msg'])})"
        ) from error


def versions() -> dict[str, str]:
    """Of the libraries that an export depends on."""
    return {name: version(name) for name in LIBRARIES}


def base_facts(setting: str, root: Path, fingerprint: str) -> BaseModelFacts:
    """The base of `model.path` or `model.generator_path`, which lies at `root`; no path of this
    machine goes into it."""
    packaged = setting.removeprefix(PACKAGED) if setting.startswith(PACKAGED) else None
    found = _SNAPSHOT.search(root.absolute().as_posix())
    hub_id = None
    if packaged is None and HUB_ID.fullmatch(setting) and not Path(setting).exists():
        hub_id = setting
    elif packaged is None and found:
        hub_id = f"{found[1]}/{found[2]}"
    name = f"tiltflow-{packaged}" if packaged else hub_id or root.resolve().name
    return BaseModelFacts(
        name=name, hub_id=hub_id, packaged=packaged, hash=fingerprint, licence=licence_of(root)
    )


def licence_of(root: Path) -> Licence | None:
    """What README.md's front matter or a licence file in a pipeline directory says; else None."""
    readme = root / "README.md"
    if readme.is_file():
        front = _FRONT.match(_beginning(readme))
        found = (
            {m["what"] or "": m["value"].strip("\"'") for m in _LICENCE.finditer(front[1])}
            if (front)
            else {}
        )
        if "" in found:
            return Licence(id=found[""], name=found.get("_name"), link=found.get("_link"))
    file = licence_file(root)
    if file is None:
        return None
    text = _beginning(file)
    if "Apache License" in text and "Version 2.0" in text:
        return Licence(id="apache-2.0")
    title = next((line.strip(" #*") for line in text.splitlines() if line.strip(" #*")), file.name)
    return Licence(id="other", name=title[:100], link=file.name)


def licence_file(root: Path) -> Path | None:
    """The licence's text in a pipeline directory, if it is there."""
    return next((root / name for name in LICENCES if (root / name).is_file()), None)


def _beginning(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(LARGEST).decode("utf-8", errors="replace")


def plain_rewards(rewards: Mapping[str, float]) -> str:
    """Rewards with their weights for a card: of an address or a path, the last part only."""
    return ", ".join(f"{_plain(name)} × {weight:g}" for name, weight in rewards.items())


def _plain(name: str) -> str:
    if name.startswith("remote:"):
        return f"remote:{name.rstrip('/').rsplit('/', 1)[-1]}"
    return name.replace("\\", "/").rsplit("/", 1)[-1]
