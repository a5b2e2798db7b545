"""What a run configuration holds (METHOD §4–§6); `rules.py` says which values go together.

Frozen and strict; what the published runs choose is in the recipes. No file is touched here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tiltflow.config.rules import check_together
from tiltflow.core.limits import FAR, LARGEST_RANK, LARGEST_SEED, MOST_IMAGES
from tiltflow.core.settings import (
    Count,
    Images,
    Level,
    Place,
    Positive,
    Rate,
    Section,
    Size,
    Steps,
    Text,
    Tokens,
)
from tiltflow.data.columns import Columns
from tiltflow.evaluation.watch.settings import WatchRules
from tiltflow.models.family import HOW_TO_ADD, family_named, family_names, has_files
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.training.settings import ColdStartConfig, TiltConfig, TrainConfig

Autocast = Literal["bf16", "auto"]
"""Mixed precision of the networks; `auto` is none on CPUs without bf16 instructions."""


CHECKPOINTED = ("decoder", "fake_score", "generator")
"""What gradient checkpointing can cover: what has a backward pass."""


AUTO = "auto"


def checkpointed_parts(value: Any) -> Any:
    """Yes, no, names out of `CHECKPOINTED`, or what the memory asks for."""
    named = isinstance(value, list | tuple) and all(part in CHECKPOINTED for part in value)
    if not named and not isinstance(value, bool) and value != AUTO:
        raise ValueError(f"be true, false, auto or a list out of {', '.join(CHECKPOINTED)}")
    return tuple(value) if named else value


Checkpointed = Annotated[
    bool | Literal["auto"] | tuple[str, ...], BeforeValidator(checkpointed_parts)
]


def known_family(name: str) -> str:
    """A family's name, or `module:RECORD`, which is imported where it is needed."""
    if ":" not in name and name not in family_names():
        *others, last = map(repr, family_names())
        raise ValueError(f"be {', '.join(others)} or {last}; {HOW_TO_ADD}")
    return name


FamilyName = Annotated[Text, AfterValidator(known_family)]


class ModelConfig(Section):
    """`base_storage`: what the frozen base is kept in, unset is `dtype`. `compile`: its blocks.
    `graphs`: passes of training are recorded once and replayed as CUDA graphs; `auto` wherever that
    can be done.

    `gradient_checkpointing`: of nothing, of all that has a backward pass, of these, or `auto`, as
    much as the device's memory asks for (`commands.planning`).
    `medium`: what is generated, by name or `package.module:name`; unset is the family's own.
    `resolution`: a square's side in pixels, [height, width], or of a video [frames, height, width].
    `guidance` is the teacher's, `student_guidance` generator's and fake score's; null is the
    model's own (for the student: what its network expects, without classifier-free guidance).
    """

    path: Place
    generator_path: Place | None = None
    family: FamilyName | None = None
    medium: Text | None = None
    resolution: Size | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    autocast: Autocast | None = None
    vae_dtype: Literal["fp32", "bf16"] | None = None
    base_storage: Literal["fp8"] | None = None
    max_sequence_length: Tokens | None = None
    few_step: Place | None = None
    guidance: float | None = None
    student_guidance: float | None = None
    gradient_checkpointing: Checkpointed = False
    compile: bool = False
    graphs: bool | Literal["auto"] = False

    @property
    def has_files(self) -> bool:
        """Whether the model is a pipeline's directory, and not of a family without files."""
        return has_files(self.path, self.family)

    @property
    def graphable(self) -> bool:
        """Whether the family is not one that is known by name to take no `model.graphs`."""
        return self.has_files and (self.family is None or family_named(self.family).graphs)

    @property
    def pipelines(self) -> Pipelines:
        """The directories, nothing of them read yet; to be handed on where more than one reads."""
        return Pipelines(self.path, self.generator_path, self.family)

    @property
    def checkpointed(self) -> frozenset[str]:
        """The parts of `gradient_checkpointing` by name; all of them while `auto` is open."""
        chosen = self.gradient_checkpointing
        if chosen == AUTO:
            return frozenset(CHECKPOINTED)
        if isinstance(chosen, bool):
            return frozenset(CHECKPOINTED if chosen else ())
        return frozenset(chosen)


class AdaptersConfig(Section):
    """`init_std` is that of A at the start (B is 0); null is PEFT's "gaussian", 1/rank."""

    kind: Literal["lora", "copies"] = "lora"
    rank: Annotated[int, Field(ge=1, le=LARGEST_RANK)] = 32
    alpha: Rate = 64.0
    targets: Text | tuple[Text, ...] | None = None
    init_std: Rate | None = None


def as_tuple(value: object) -> object:
    """A list as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


class BucketConfig(Section):
    """A size of pictures, as `model.resolution`, and how often it is drawn beside the others."""

    size: Size
    weight: Annotated[float, Field(gt=0, le=FAR)] = 1.0  # sums of them are finite


def plain_size(value: object) -> object:
    """A bare size as a bucket; anything else as it is."""
    return {"size": value} if isinstance(value, int | list | tuple) else value


Buckets = tuple[Annotated[BucketConfig, BeforeValidator(plain_size)], ...]


class DataConfig(Section):
    """`buckets`: sizes of pictures, each rollout being of one that is drawn; or the column of the
    prompt file that has each prompt's.

    `cache`: where embeddings are kept; unset is the user's own place, `off` nowhere.

    `split`: which of the splits of a source; `eval_split` that of the other prompts. `columns`:
    what its columns are called, and those of `eval_prompts`.
    """

    prompts: Place
    split: Text | None = None
    eval_prompts: Place | None = None
    eval_split: Text | None = None
    columns: Columns = Columns()
    cache: Place | None = None
    buckets: Text | Annotated[Buckets, Field(min_length=1, max_length=100)] | None = None


def several_steps(value: object) -> object:
    """A list as a tuple, in ascending order and each number once, of one number as that; anything
    else as it is.

    Raises:
        ValueError: if it is in another order.
    """
    if not isinstance(value, list | tuple) or not all(type(k) is int for k in value):
        return as_tuple(value)
    if list(value) != sorted(set(value)):
        raise ValueError("be in ascending order, each number once")
    return value[0] if len(value) == 1 else tuple(value)


SeveralSteps = Annotated[tuple[Steps, ...], Field(min_length=1, max_length=100)]


class SamplerConfig(Section):
    """`steps`: K, or several: each rollout has one of them, which is drawn."""

    steps: Annotated[Steps | SeveralSteps, BeforeValidator(several_steps)] = 4
    eta: Annotated[float, Field(ge=0, le=1)] = 0.9

    @property
    def grids(self) -> tuple[int, ...]:
        """The numbers of steps, the smallest first."""
        return self.steps if isinstance(self.steps, tuple) else (self.steps,)

    @property
    def least(self) -> int:
        return self.grids[0]

    @property
    def most(self) -> int:
        """The steps of samples, of the watch, and of the export's call by default."""
        return self.grids[-1]

    @property
    def boundaries(self) -> int:
        """Those of all grids."""
        return sum(self.grids)


class RewardConfig(Section):
    """`backprop`: back-propagate it where it is differentiable. `options` go to the reward.
    `frames`: how many of a video's a reward of images looks at."""

    weight: float
    path: Place | None = None
    frames: Positive | None = None
    backprop: bool = True
    options: dict[str, Any] = Field(default_factory=dict)


def plain_weight(value: object) -> object:
    """A bare number as a reward's weight; anything else as it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"weight": value} if number else value


Rewards = dict[Text, Annotated[RewardConfig, BeforeValidator(plain_weight)]]


class WatchConfig(Section):
    """Held-out `rewards`: logged, never trained on. The rest belongs to the watch of stage 2.

    `frequency` is in cycles a pixel: by default, structure finer than a latent cell of 8 pixels.
    """

    rewards: Rewards = Field(default_factory=dict)
    every: Positive = 50
    prompts: Images = 64
    stop: bool = False
    clip: Place | None = None
    diversity_prompts: Images = 24
    diversity_images: Annotated[int, Field(ge=2, le=MOST_IMAGES)] = 4
    teacher_images: Images = 32
    teacher_steps: Steps = 25
    frequency: Annotated[float, Field(gt=0, lt=0.5)] = 0.125
    levels: tuple[Level, ...] = Field(default=(0.2, 0.4, 0.6, 0.8), min_length=1, max_length=100)
    rules: WatchRules = WatchRules()


def resume_choice(value: Any) -> Any:
    """Yes, no, or `auto`: go on where there is a run, begin where there is none."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("be true, false or auto")
    return value


Resume = Annotated[bool | str, BeforeValidator(resume_choice)]


def device_name(value: str) -> str:
    """A device as torch writes it, or `auto`."""
    if not re.fullmatch(r"[a-z]+(:\d+)?", value):
        raise ValueError("be auto, cpu, cuda, cuda:1 or mps")
    return value


def checkpoint_name(value: str) -> str:
    """`latest`, or the name of a checkpoint's directory."""
    if not re.fullmatch(r"latest|step-\d{6,}", value):
        raise ValueError("be latest or a checkpoint's name, as step-000100")
    return value


class RunSection(Section):
    """`resume`: true goes on with a run that is there, auto also begins one where none is.

    `resume_from` is `latest` or one checkpoint's name; `sharding` is of the frozen base.

    `replan`: a run whose `auto` no longer fits the device goes on with another plan.
    `rank_timeout`: seconds of silence after which a rank is given up and the job ends.
    """

    out: Place
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    resume: Resume = False
    resume_from: Annotated[str, AfterValidator(checkpoint_name)] = "latest"
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    replan: bool = False
    rank_timeout: Annotated[float, Field(ge=5, le=86400)] = 100.0


class CheckpointConfig(Section):
    every: Positive = 100
    keep: Positive = 2


class LogConfig(Section):
    """`samples_every` 0 draws none."""

    every: Positive = 10
    samples_every: Count = 0
    samples: Images = 16
    tensorboard: bool = False
    wandb: bool = False


class RunConfig(Section):
    """Everything one run needs. `cold_start` and `tilt` belong to their stage only."""

    stage: Literal["cold_start", "tilt"]
    model: ModelConfig
    adapters: AdaptersConfig = AdaptersConfig()
    data: DataConfig
    sampler: SamplerConfig = SamplerConfig()
    train: TrainConfig
    cold_start: ColdStartConfig = ColdStartConfig()
    tilt: TiltConfig = TiltConfig()
    rewards: Rewards = Field(default_factory=dict)
    watch: WatchConfig = WatchConfig()
    run: RunSection
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _cross_check(self) -> RunConfig:
        check_together(self)
        return self
