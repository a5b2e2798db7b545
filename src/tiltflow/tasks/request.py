"""What `tiltflow sample` and `evaluate` are asked for, settled and loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tiltflow.core.checkpoint import Checkpoint
from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.core.limits import check_tilt
from tiltflow.core.paths import embedding_cache
from tiltflow.core.precision import autocast_dtype
from tiltflow.core.randomness import Randomness
from tiltflow.core.sizes import Resolution
from tiltflow.data.buckets import Bucket
from tiltflow.data.embedding_cache import EmbeddingCache, EncoderKey, encoded_sets
from tiltflow.data.embeddings import (
    BATCH,
    EncodedPrompts,
    check_negatives,
    distinct,
    encode_prompts,
)
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Backbone, Parts, check_guidance
from tiltflow.models.families import load_backbone
from tiltflow.models.family import has_files
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.fingerprint import encoder_facts
from tiltflow.models.pipelines.guidance import guided_turbo
from tiltflow.models.pipelines.meta import meta_backbone
from tiltflow.models.pipelines.weights import check_weights
from tiltflow.setup.build import DTYPES, device_of
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.choices import Choices, Dtype, settle
from tiltflow.tasks.copies import checkpoints_of, load_copies, settle_copies
from tiltflow.tasks.sized import check_sizes
from tiltflow.tasks.systems import Loaded, Sampler, load_students


@dataclass(frozen=True)
class Request:
    """What to sample from, and how; None is settled by `Request.settled`."""

    model: str
    prompts: Sequence[Prompt]
    few_step: Path | None = None
    tilt_lora: Path | None = None
    tilt: float = 1.0
    steps: int | None = None
    eta: float | None = None
    teacher_steps: int = 50
    guidance: float | None = None
    """The teacher's; None is the model's own."""
    student_guidance: float | None = None
    seed: int = 0
    batch: int = 64
    device: str = "auto"
    dtype: Dtype | None = None
    autocast: str | None = None
    """As `model.autocast` of a run: bf16, auto or None."""
    resolution: Resolution | None = None
    buckets: tuple[Bucket, ...] = ()
    """Sizes of pictures in the place of `resolution`, each of all prompts or of its own."""
    max_sequence_length: int | None = None
    generator_path: str | None = None
    family: str | None = None
    """As `model.family` of a run: a name or `module:RECORD`; None reads it off the directory."""
    cache: str | None = None
    """As `data.cache` of a run."""
    rewards: Mapping[str, str | None] = field(default_factory=dict)
    """Names of rewards, each with the path of its weights or None."""
    diversity: bool = False

    @cached_property
    def pipelines(self) -> Pipelines:
        """The directories, whose files are read once."""
        return Pipelines(self.model, self.generator_path, self.family)

    @cached_property
    def settled(self) -> Choices:
        """How the students are sampled, by the contract of their export.

        Raises:
            ValueError: if `tilt` is outside [0, 1.5], a number is not finite, or a LoRA folder or
                its contract cannot be read.
        """
        self._check()
        asked = {
            "steps": self.steps,
            "eta": self.eta,
            "guidance": self.student_guidance,
            "resolution": self.resolution,
            "max_sequence_length": self.max_sequence_length,
        }
        if not self.has_files:
            return settle_copies(asked, self.checkpoints)
        sizes = [bucket.size for bucket in self.buckets]
        return settle(asked, self.dtype, self.pipelines, self.few_step, self.tilt_lora, sizes)

    @property
    def has_files(self) -> bool:
        """Whether the model is a pipeline's directory; else the students are runs' networks, and
        `few_step` and `tilt_lora` the run directories."""
        return has_files(self.model, self.family)

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Of a model without files, the runs' checkpoints.

        Raises:
            ValueError: as `checkpoints_of`.
        """
        assert self.few_step is not None
        return checkpoints_of(self.few_step, self.tilt_lora)

    def _check(self) -> None:
        """Raises ValueError for what is wrong whatever the model is."""
        check_tilt("--tilt", self.tilt)
        for option, value in (
            ("--guidance", self.guidance), ("--student-guidance", self.student_guidance)
        ):  # fmt: skip
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{option} is {value}, which is no finite number")
        if not self.has_files and self.tilt != 1:
            raise ValueError(f"--tilt is {self.tilt}, but a student without adapters has no dial")
        if self.has_files and self.tilt != 1 and self.tilt_lora is None:
            raise ValueError(f"--tilt is {self.tilt}, but there is no --tilt-lora to have it")
        if not self.has_files and self.buckets:
            raise ValueError(f"sizes are of pictures, and the {self.model} makes none")
        if not self.has_files and self.few_step is None:
            raise ValueError(
                f"the {self.model} backbone has no images to sample; use tiltflow train"
            )


def prepare(request: Request, ranks: Ranks = ALONE) -> tuple[Loaded, Sampler]:
    """Encodes the prompts, and then loads the rest of the model and its LoRAs.

    Raises:
        ValueError: as `Request.settled` and `check_request`, or if anything does not load.
    """
    if not request.has_files:
        return _prepare_copies(request)
    check_request(request)
    with ranks.main_first():  # the others find the prompts in the cache
        encoded = _encoded(request)
    backbone = backbone_of(request, "image")
    backbone.thaw()  # type: ignore[attr-defined]
    mixed = autocast_dtype(request.autocast, backbone.device)
    chosen = request.settled
    folders, baked = (request.few_step, request.tilt_lora), bool(chosen.tilt)
    loaded = load_students(backbone, *folders, request.tilt, mixed, chosen.guidance, baked)
    return loaded, _sampler(request, backbone, encoded)


def _prepare_copies(request: Request) -> tuple[Loaded, Sampler]:
    device = device_of(request.device)
    request.settled  # noqa: B018  # says what is wrong before anything is made
    loaded = load_copies(request.family or request.model, request.checkpoints, device)
    check_guidance(loaded.backbone, request.guidance, "--guidance")
    check_negatives(request.prompts, loaded.backbone, request.guidance)
    encoded = encode_prompts(loaded.backbone, request.prompts)
    return loaded, _sampler(request, loaded.backbone, encoded)


def _sampler(request: Request, backbone: Backbone, encoded: EncodedPrompts) -> Sampler:
    guidance = backbone.guidance if request.guidance is None else request.guidance
    return Sampler(
        encoded,
        Randomness(request.seed),
        request.settled.steps,
        request.settled.eta,
        request.teacher_steps,
        guidance,
        request.settled.levels,
    )


def check_request(request: Request) -> None:
    """Whether the weight files are the networks', and the LoRAs finite and this model's, before
    any weight of the model loads: the students are made once in shape only.

    Raises:
        ValueError: as `check_pipeline`, `check_weights`, `meta_backbone`, `check_sizes` and
            `load_students`.
    """
    model, generator = request.pipelines.model, request.pipelines.generator
    family = check_directory(model)
    check_weights(model)
    if generator is not None:
        generator.asked = generator.asked or family.name
        check_directory(generator)
        check_weights(generator, ["transformer"])
    several = request.buckets and request.buckets[0].prompts is None
    named = "--size " if several or isinstance(request.resolution, tuple) else "the size "
    settings = _settings(request) | {"size_name": named}
    shapes = meta_backbone(model, generator_path=generator, **settings)
    check_sizes(request.buckets, shapes)
    check_guidance(shapes, request.guidance, "--guidance")
    check_negatives(request.prompts, shapes, request.guidance)
    if request.few_step or request.tilt_lora:
        load_students(shapes, request.few_step, request.tilt_lora, request.tilt)


def _settings(request: Request) -> dict[str, Any]:
    """What a backbone of the request is made with, whatever holds its weights."""
    chosen, resolution = request.settled, request.settled.resolution
    if request.buckets and request.pipelines.model.family.videos:
        # of one medium with the sizes: the model's own, or the student's, may be of the other
        resolution = request.buckets[0].size
    return {
        "dtype": DTYPES[chosen.dtype],
        "vae_dtype": DTYPES[chosen.vae_dtype] if chosen.vae_dtype else None,
        "resolution": resolution,
        "max_sequence_length": chosen.max_sequence_length,
    }


def backbone_of(request: Request, parts: Parts) -> Backbone:
    """The request's model, or the parts of it that are asked for.

    Raises:
        ValueError: as `load_backbone`.
    """
    return load_backbone(
        request.pipelines.model,
        generator_path=request.pipelines.generator,
        device=device_of(request.device),
        parts=parts,
        **_settings(request),
    )


def _encoded(request: Request) -> EncodedPrompts:
    """The prompts through the text encoders, which are dropped, or out of the embedding cache.

    As many at a time as there are, up to `BATCH`, as a pipeline's call would: a matrix product
    rounds by its size, and that is part of the cache's key.
    """
    batch = max(1, min(BATCH, len(distinct(request.prompts))))
    root = embedding_cache(request.cache)
    cache = None
    if root is not None:
        chosen = request.settled
        check_directory(request.pipelines.model)
        facts = encoder_facts(
            request.pipelines.model,
            dtype=chosen.dtype,
            device=device_of(request.device).type,
            max_sequence_length=chosen.max_sequence_length,
            batch_size=batch,
        )
        cache = EmbeddingCache(root, EncoderKey(request.model, facts))
    sets = [list(request.prompts)]
    return encoded_sets(cache, sets, lambda: backbone_of(request, "text"), batch_size=batch)[0]


def say_settled(request: Request, callbacks: Callbacks) -> None:
    """The lines that say where the request is not as the student was trained."""
    for note in request.settled.notes:
        callbacks.notice(note)


def say_guided(request: Request, loaded: Loaded, callbacks: Callbacks) -> None:
    """A line where the teacher is sampled with guidance that it may have been distilled without."""
    if loaded.teacher is None or not request.has_files:
        return
    path = str(request.pipelines.model)
    line = guided_turbo(path, loaded.backbone, request.guidance, "--guidance 1")
    if line is not None:
        callbacks.notice(f"warning: {line}")


def say_unused(request: Request, student: bool, callbacks: Callbacks) -> None:
    """A line where an option is of the other kind of system than the one that is sampled, the
    student or the teacher."""
    of_students = {
        "--steps": request.steps,
        "--eta": request.eta,
        "--student-guidance": request.student_guidance,
    }
    given = [o for o, value in of_students.items() if value is not None]
    if not student and given:
        callbacks.notice(
            f"warning: {' and '.join(given)} {'are' if len(given) > 1 else 'is'} of students, and "
            f"the teacher is sampled: in --teacher-steps {request.teacher_steps}"
        )
    negative = any(prompt.negative for prompt in request.prompts)
    of_teacher = {
        "--guidance is": request.guidance is not None,
        "negative prompts are": negative and request.settled.guidance in (None, 1.0),
    }
    for what in (what for what, unused in of_teacher.items() if student and unused):
        callbacks.notice(f"warning: {what} the teacher's, and a student is sampled")
