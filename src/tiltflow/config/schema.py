"""What a run configuration holds (METHOD §4–§6); `rules.py` says which values go together.

Frozen and strict; what the published runs choose is in the recipes. No file is touched here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tiltflow.config.rules import check_together
from tiltflow.core.limits import (
    FAR,
    LARGEST_RANK,
    LARGEST_SEED,
    LONGEST_SIDE,
    MOST_IMAGES,
    MOST_SAMPLES,
    MOST_STEPS,
    MOST_TOKENS,
)
from tiltflow.core.paths import home_for_tilde
from tiltflow.models.family import HOW_TO_ADD, family_named, family_names, has_files
from tiltflow.models.pipelines.directory import Pipelines

Positive = Annotated[int, Field(ge=1, le=FAR)]
Count = Annotated[int, Field(ge=0, le=FAR)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _place(path: str) -> str:
    """A path with the home directory for a leading `~`."""
    if "\0" in path:
        raise ValueError("have no null character in it")
    try:
        return home_for_tilde(path)
    except ValueError as error:
        raise ValueError("not begin with the ~ of a user who has no home directory") from error


Place = Annotated[Text, AfterValidator(_place)]
"""A path, a hub id or something packaged; the home directory stands for a leading `~`."""


class Section(BaseModel):
    """Frozen, and nothing is coerced: 4.0 is no integer, "4" is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
    `resolution`: a square's side in pixels, or [height, width].
    `guidance` is the teacher's, `student_guidance` generator's and fake score's; null is the
    model's own (for the student: what its network expects, without classifier-free guidance).
    """

    path: Place
    generator_path: Place | None = None
    family: FamilyName | None = None
    medium: Text | None = None
    resolution: Side | tuple[Side, Side] | None = None
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


class DataConfig(Section):
    """`cache`: where embeddings are kept; unset is the user's own place, `off` nowhere.

    `split`: which of a directory's splits; `eval_split` that of the other prompts.
    """

    prompts: Place
    split: Text | None = None
    eval_prompts: Place | None = None
    eval_split: Text | None = None
    cache: Place | None = None


class SamplerConfig(Section):
    steps: Steps = 4
    eta: Annotated[float, Field(ge=0, le=1)] = 0.9


class TrainConfig(Section):
    """`batch_size` is global (stage 2: samples a rollout), `micro_batch_size` a rank's.

    `fake_scores`: one for the samples of all boundaries, as published, or one for each boundary.
    `boundary_power` p: the matching gradient at level s counts (1 − s)^−p times; 0 as published.
    `skip_nonfinite` is how many steps a run may skip for a non-finite number before it stops.
    `fake_score_weight_decay`: null is `weight_decay`. `ema_…`: `train/averaging.py`.
    """

    steps: Positive
    batch_size: Samples
    micro_batch_size: Samples | None = None
    generator_lr: Rate
    fake_score_lr: Rate
    fake_scores: Literal["shared", "per_boundary"] = "shared"
    boundary_power: Weight = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Weight = 0.0
    fake_score_weight_decay: Weight | None = None
    clip: Rate = 1.0
    ema: Beta = 0.99
    ema_every: Literal["update", "iteration"] = "update"
    ema_warmup: bool = False
    ema_interval: Positive = 1
    ema_repeats: Positive = 1
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Count = 0
    skip_nonfinite: Count = 0

    @property
    def micro(self) -> int:
        """Samples that go through a network at once: all, or at most `micro_batch_size`."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


class ColdStartConfig(Section):
    """METHOD §4; `consistency_max_delta` is in thousandths of σ.

    `reuse` is how many iterations one rollout serves: 1 as published, at most K.
    `keep_graph`: the step that the generator's update differentiates is run once, and its graph
    kept while the fake score is updated.
    `fresh_boundary`: the generator's update has boundary samples of its own.
    """

    generator_every: Positive = 10
    fresh_boundary: bool = False
    reuse: Steps = 1
    keep_graph: bool = False
    consistency: Weight = 0.01
    consistency_form: Literal["two_sample", "one_sample"] = "two_sample"
    consistency_max_delta: Annotated[int, Field(ge=1, le=1000)] = 200


class TiltConfig(Section):
    """METHOD §5; `subset` is M. `reward_steps`: the last steps that rewards go back through.

    `reward_normalise`: every sample's reward gradient counts alike; as published, as it comes.
    The settings from `kl_form` to `round_images` are explained at `train/tilt_settings.py`'s.
    `fake_score_start`: stage 1's fake score trained on, or frozen under a fresh adapter.
    `keep_graph`: the steps that the generator's update differentiates run once, their graphs kept
    from the rollout; `auto` where `gradient_checkpointing=auto` finds the memory for it.
    """

    group_size: Annotated[int, Field(ge=2, le=MOST_SAMPLES)] = 24
    subset: Steps = 2
    clip_range: Rate = 1e-5
    advantage_clip: Rate = 5.0
    kl: Weight = 0.0
    log_prob: Literal["unit", "gaussian"] = "unit"
    kl_form: Literal["unit", "gaussian"] | None = None
    policy_reduction: Literal["mean", "sum"] = "mean"
    merge_same_prompts: bool = False
    drop_zero_advantages: bool = False
    round_images: bool = False
    keep_graph: bool | Literal["auto"] = False
    policy_weight: Weight = 1.0
    matching_weight: Weight = 1e-3
    reward_weight: Weight = 1e-4
    reward_target: float = 3.0
    reward_steps: Steps = 1
    reward_normalise: bool = False
    decode_chunk: Samples | None = None
    match_steps: Literal["last", "random", "all"] = "last"
    fake_score_start: Literal["continued", "fresh"] = "continued"
    fake_score_updates: Steps = 1
    consistency: Weight = 0.01
    consistency_form: Literal["two_sample", "one_sample"] = "two_sample"
    consistency_max_delta: Annotated[int, Field(ge=1, le=1000)] = 200


class RewardConfig(Section):
    """`backprop`: back-propagate it where it is differentiable. `options` go to the reward."""

    weight: float
    path: Place | None = None
    backprop: bool = True
    options: dict[str, Any] = Field(default_factory=dict)


def plain_weight(value: object) -> object:
    """A bare number as a reward's weight; anything else as it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"weight": value} if number else value


Rewards = dict[Text, Annotated[RewardConfig, BeforeValidator(plain_weight)]]


class WatchRules(Section):
    """When the watch warns (docs/watch.md); null switches a rule off."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    held_out_fall: Annotated[float, Field(ge=0)] | None = 0.25
    agreement: Annotated[float, Field(gt=-1, lt=1)] | None = 0.4
    diversity: Annotated[float, Field(gt=0, lt=1)] | None = 0.7
    high_frequency: Annotated[float, Field(gt=1)] | None = 2.0
    drift: Annotated[float, Field(gt=1)] | None = 1.5


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


class RunSection(Section):
    """`resume`: true goes on with a run that is there, auto also begins one where none is.

    `resume_from` is `latest` or one checkpoint's name; `sharding` is of the frozen base.

    `replan`: a run whose `auto` no longer fits the device goes on with another plan.
    `rank_timeout`: seconds of silence after which a rank is given up and the job ends.
    """

    out: Place
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    device: Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")] = "auto"
    resume: Resume = False
    resume_from: Annotated[str, Field(pattern=r"^(latest|step-\d{6,})$")] = "latest"
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
