"""What a model family is to the rest of the program, and where families are found.

A record says what must be known before any network is made: the classes of a pipeline's parts,
which of them may be absent, what its call takes, what a run may ask of it. What its networks do is
in the backbone that the record names. Nothing here imports torch, and a family's module is
imported when one of its pipelines, or its record, is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiltflow.core.registry import dotted, entries

BUILTIN: dict[str, tuple[str | None, str]] = {
    "sd3": ("StableDiffusion3Pipeline", "tiltflow.models.families.sd3:FAMILY"),
    "flux": ("FluxPipeline", "tiltflow.models.families.flux:FAMILY"),
    "flux2": ("Flux2KleinPipeline", "tiltflow.models.families.flux2:FAMILY"),
    "flux2_dev": ("Flux2Pipeline", "tiltflow.models.families.flux2_dev:FAMILY"),
    "z_image": ("ZImagePipeline", "tiltflow.models.families.z_image:FAMILY"),
    "sana": ("SanaPipeline", "tiltflow.models.families.sana:FAMILY"),
    "chroma": ("ChromaPipeline", "tiltflow.models.families.chroma:FAMILY"),
    "qwen_image": ("QwenImagePipeline", "tiltflow.models.families.qwen_image:FAMILY"),
    "qwen_image_21": ("QwenImage21Pipeline", "tiltflow.models.families.qwen_image_21:FAMILY"),
    "krea2": ("Krea2Pipeline", "tiltflow.models.families.krea2:FAMILY"),
    "wan": ("WanPipeline", "tiltflow.models.families.wan:FAMILY"),
    "mixture": (None, "tiltflow.models.families:MIXTURE"),
}
"""By name: the diffusers pipeline (None: the family needs no files), and the record's place."""

GROUP = "tiltflow.families"
"""Entry points of other packages: `name = "module:RECORD"`."""

HOW_TO_ADD = "a family can be added from outside as model.family=module:RECORD (docs/backbones.md)"


REPEAT = (
    "Give a prompt as often as it has images, and no `num_images_per_prompt`: with that and "
    "prompts of different lengths the pipeline gives images another prompt's mask (diffusers "
    "0.42.1)."
)
"""The caution of pipelines that do so."""


@dataclass(frozen=True)
class Published:
    """A pipeline on the hub: its parts' configurations, for looking before downloading, and the
    licence that an export's card names (`licence` is the hub's identifier)."""

    configs: Mapping[str, Any]
    licence: str
    licence_name: str | None = None
    licence_link: str | None = None
    gated: bool = False
    """Whether the hub asks for an agreement before it gives the files."""


@dataclass(frozen=True)
class Family:
    """A model family. `networks` are the classes of a pipeline's networks by the parts' names."""

    name: str
    backbone: str
    """`module:Class` of what makes its networks velocities."""
    pipeline: str | None = None
    """The diffusers pipeline; None for a family that needs no files."""
    title: str = ""
    """What one model is called in a sentence."""
    networks: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """One class, or several of which the first is the published pipeline's."""
    required: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Besides transformer, vae and scheduler: the parts that the pipeline cannot do without."""
    absent_encoders: bool = False
    """Whether text encoders may be null in the index, as long as there is one."""
    chat_template: bool = False
    """Whether prompts go through the tokenizer's (or processor's) chat template."""
    keeps_states: tuple[str, ...] = ()
    """The text encoders that the pipeline asks for the states of every layer, which are all in
    memory while a batch is encoded."""
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    """What the teacher's pipeline may come with."""
    whole: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Whole numbers of its configurations (or lists of them) that no other family has, with their
    bounds."""
    nullable: tuple[str, ...] = ()
    """Numbers of its configurations that may be null."""
    depths: tuple[str, ...] = ()
    """Of these, numbers of layers: no more than there are weights."""
    widths: tuple[str, ...] = ()
    """Of these, sizes that some weight has along some dimension."""
    token_patch: int = 1
    """How many latent cells wide a token of the pipeline's own latents is (1: they are no tokens,
    or one a cell); a `patch_size` in the pipeline's index goes before it."""
    lora_targets: str | tuple[str, ...] = ()
    """The modules that adapters go on by default (METHOD §6), as PEFT takes them."""
    no_gradient: tuple[str, ...] = ()
    """Ends of the names of adapted modules whose result nothing reads, so that their adapters have
    no gradient by construction; `{last}` is the number of the last block."""
    input_weight: str = "context_embedder"
    """A module of the transformer whose weight has the type that inputs are given in."""
    blocks: tuple[str, ...] = ()
    """Classes of repeated blocks for `model.compile`; empty is diffusers' own list."""
    graphs: bool = False
    """Whether a pass reads nothing from the host, so that `model.graphs` can record it."""
    twin: tuple[str, ...] = ()
    """What two transformers must share for `model.generator_path`; empty: it takes none."""
    twin_index: Mapping[str, object] = field(default_factory=dict)
    """Of the pipelines' indexes too: what must be shared, and what stands for a key that is not
    there."""
    text_packages: tuple[str, ...] = ()
    """Packages beside the usual libraries that its pipeline's prompts go through."""
    videos: bool = False
    """Whether it makes videos, of which a picture is one frame."""
    guidance_argument: str = "guidance_scale"
    guidance_offset: float = 0.0
    """How much less the pipeline's argument is than a guidance scale of 1 = one pass."""
    takes_length: bool = True
    """Whether the pipeline's call takes `max_sequence_length`."""
    own_vae_dtype: bool = False
    """Whether the pipeline's call takes an autoencoder in another type than the transformer's."""
    call: Mapping[str, object] = field(default_factory=dict)
    """Further arguments that the pipeline's call needs to give what was trained."""
    guided_call: Mapping[str, object] = field(default_factory=dict)
    """Those that it needs beside a guidance scale of more than one pass."""
    result: str = "{call}.images"
    """Python for the pictures of what `{call}` gives."""
    caution: str = ""
    """Sentences for who calls the pipeline: where its images are not those of `tiltflow sample`."""
    student_schedule: Mapping[str, object] = field(default_factory=dict)
    """What of the scheduler's configuration the few-step grid overrides: a grid is the pipeline's
    own scheduler's for K equal raw levels, with these."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """Pipelines by hub id."""

    def classes(self, part: str) -> tuple[str, ...]:
        """The classes that a part may have; none where the family has no word on it."""
        found = self.networks.get(part, ())
        return (found,) if isinstance(found, str) else found

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(part for part in self.networks if part.startswith("text_encoder"))

    def few_step_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the few-step grid's scheduler, from that of the pipeline's own.
        DPM-Solver's name for the shift of a flow is `flow_shift`."""
        shift = {"shift": config["flow_shift"]} if "flow_shift" in config else {}
        return {**config, **shift, **self.student_schedule}

    def backbone_class(self) -> Any:
        """What `backbone` names, imported: a subclass of `PipelineBackbone`, or of a family without
        files a `Backbone` that takes a device."""
        return dotted("backbone", self.backbone)


def family_named(name: str) -> Family:
    """A family by its name, or by `module:RECORD` from anywhere.

    Raises:
        ValueError: if there is none of the name, or no record at the place.
    """
    return _record(_place_named(name))


def _place_named(name: str) -> str:
    """Where the record of a name is, as `module:RECORD`.

    Raises:
        ValueError: if there is none of the name.
    """
    if name in BUILTIN:
        return BUILTIN[name][1]
    if ":" in name:
        return name
    for entry in entries(GROUP):
        if entry.name == name:
            return entry.value
    raise ValueError(f"model.family {name!r} is none of {', '.join(family_names())}; {HOW_TO_ADD}")


def family_names() -> list[str]:
    """The names that `model.family` knows, without what a recipe may give as `module:RECORD`."""
    return [*BUILTIN, *(entry.name for entry in entries(GROUP))]


def families() -> list[Family]:
    """Every family with files that has a name. Imports all of them."""
    return [f for f in map(family_named, family_names()) if f.pipeline is not None]


def pipeline_classes() -> list[str]:
    """The diffusers pipelines of the families that have a name."""
    others = (_record(entry.value).pipeline for entry in entries(GROUP))
    kinds = (*(kind for kind, _ in BUILTIN.values()), *others)
    return [kind for kind in kinds if kind is not None]


def graph_families() -> list[str]:
    """Those that `model.graphs` is for."""
    return [family.name for family in families() if family.graphs]


def family_of_class(pipeline: str) -> Family | None:
    """The family whose pipelines are of this diffusers class, or None."""
    place = _place_of_class(pipeline)
    return None if place is None else _record(place)


def _place_of_class(pipeline: str) -> str | None:
    for kind, place in BUILTIN.values():
        if kind == pipeline:
            return place
    others = (entry.value for entry in entries(GROUP))
    return next((place for place in others if _record(place).pipeline == pipeline), None)


def own_place(asked: str | None, pipeline: str) -> str | None:
    """The `module:RECORD` of the family that a pipeline of this class is read as, where that is not
    a builtin one; None where it is. `asked` is the family that was asked for, if one was.

    Raises:
        ValueError: as `family_named`.
    """
    place = _place_of_class(pipeline) if asked is None else _place_named(asked)
    builtin = any(place == known for _, known in BUILTIN.values())
    return None if builtin else place


def has_files(path: str | None, family: str | None = None) -> bool:
    """Whether a model is a pipeline's directory; False for a family that needs none, which is
    asked for by its name."""
    return all(BUILTIN.get(name or "", ("", ""))[0] is not None for name in (path, family))


def published(hub_id: str) -> Published | None:
    """What is known of a pipeline on the hub without its files."""
    return next((f.published[hub_id] for f in families() if hub_id in f.published), None)


@functools.cache
def _record(place: str) -> Family:
    found = dotted("model.family", place)
    if not isinstance(found, Family):
        raise ValueError(f"model.family: {place} is no tiltflow.models.family.Family")
    return found
