"""What a run configuration holds, and which values go together (METHOD §4–§6).

Frozen and strict; defaults are the published values. No file is touched here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen, and nothing is coerced: 4.0 is no integer, "4" is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Autocast = Literal["bf16", "auto"]
"""Mixed precision of the networks; `auto` is none on CPUs without bf16 instructions."""


CHECKPOINTED = ("decoder", "fake_score", "generator")
"""What gradient checkpointing can cover: what has a backward pass."""


def checkpointed_parts(value: Any) -> Any:
    """Yes, no, or names out of `CHECKPOINTED`."""
    named = isinstance(value, list | tuple) and all(part in CHECKPOINTED for part in value)
    if not named and not isinstance(value, bool):
        raise ValueError(f"be true, false or a list out of {', '.join(CHECKPOINTED)}")
    return tuple(value) if named else value


Checkpointed = Annotated[bool | tuple[str, ...], BeforeValidator(checkpointed_parts)]


class ModelConfig(Section):
    """`base_storage`: what the frozen base is kept in, unset is `dtype`. `compile`: its blocks.

    `gradient_checkpointing`: of nothing, of all that has a backward pass, or of these.
    """

    path: Text
    generator_path: Text | None = None
    family: Literal["sd3", "flux", "flux2", "mixture"] | None = None
    resolution: Positive | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    autocast: Autocast | None = None
    vae_dtype: Literal["fp32", "bf16"] | None = None
    base_storage: Literal["fp8"] | None = None
    max_sequence_length: Count | None = None
    few_step: Text | None = None
    guidance: float | None = None
    gradient_checkpointing: Checkpointed = False
    compile: bool = False

    @property
    def checkpointed(self) -> frozenset[str]:
        """The parts of `gradient_checkpointing` by name."""
        chosen = self.gradient_checkpointing
        if isinstance(chosen, bool):
            return frozenset(CHECKPOINTED if chosen else ())
        return frozenset(chosen)


class AdaptersConfig(Section):
    kind: Literal["lora", "copies"] = "lora"
    rank: Positive = 32
    alpha: Rate = 64.0
    targets: Text | tuple[Text, ...] | None = None


class DataConfig(Section):
    """`cache`: where embeddings are kept; unset is the user's own place, `off` nowhere."""

    prompts: Text
    eval_prompts: Text | None = None
    cache: Text | None = None


class SamplerConfig(Section):
    steps: Positive = 4
    eta: Annotated[float, Field(ge=0, le=1)] = 0.9


class TrainConfig(Section):
    """`batch_size` is global (stage 2: samples a rollout), `micro_batch_size` a rank's.

    `fake_scores`: one for the samples of all boundaries, as published, or one for each boundary.
    `boundary_power` p: the matching gradient at level s counts (1 − s)^−p times; 0 as published.
    `skip_nonfinite` is how many steps a run may skip for a non-finite number before it stops.
    """

    steps: Positive
    batch_size: Positive
    micro_batch_size: Positive | None = None
    generator_lr: Rate
    fake_score_lr: Rate
    fake_scores: Literal["shared", "per_boundary"] = "shared"
    boundary_power: Weight = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Weight = 0.0
    clip: Rate = 1.0
    ema: Beta = 0.99
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
    """

    generator_every: Positive = 10
    reuse: Positive = 1
    keep_graph: bool = False
    consistency: Weight = 0.01
    consistency_form: Literal["two_sample", "one_sample"] = "two_sample"
    consistency_max_delta: Annotated[int, Field(ge=1, le=1000)] = 200


class TiltConfig(Section):
    """METHOD §5; `subset` is M. `reward_steps`: the last steps that rewards go back through.

    `reward_normalise`: every sample's reward gradient counts alike; as published, as it comes.
    """

    group_size: Annotated[int, Field(ge=2)] = 24
    subset: Positive = 2
    clip_range: Rate = 1e-5
    advantage_clip: Rate = 5.0
    kl: Weight = 0.0
    log_prob: Literal["unit", "gaussian"] = "unit"
    policy_weight: Weight = 1.0
    matching_weight: Weight = 1e-3
    reward_weight: Weight = 1e-4
    reward_target: float = 3.0
    reward_steps: Positive = 1
    reward_normalise: bool = False
    decode_chunk: Positive | None = None
    match_steps: Literal["last", "random", "all"] = "last"
    fake_score_updates: Positive = 1
    consistency: Weight = 0.01


class RewardConfig(Section):
    """`backprop`: back-propagate it where it is differentiable. `options` go to the reward."""

    weight: float
    path: Text | None = None
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
    prompts: Positive = 64
    stop: bool = False
    clip: Text | None = None
    diversity_prompts: Positive = 24
    diversity_images: Annotated[int, Field(ge=2)] = 4
    teacher_images: Positive = 32
    teacher_steps: Positive = 25
    frequency: Annotated[float, Field(gt=0, lt=0.5)] = 0.125
    levels: tuple[Level, ...] = Field(default=(0.2, 0.4, 0.6, 0.8), min_length=1)
    rules: WatchRules = WatchRules()


class RunSection(Section):
    """`resume_from` is `latest` or one checkpoint's name; `sharding` is of the frozen base."""

    out: Text
    seed: Count = 0
    device: Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")] = "auto"
    resume: bool = False
    resume_from: Annotated[str, Field(pattern=r"^(latest|step-\d{6,})$")] = "latest"
    sharding: Literal["replicated", "fsdp2"] = "replicated"


class CheckpointConfig(Section):
    every: Positive = 100
    keep: Positive = 2


class LogConfig(Section):
    """`samples_every` 0 draws none."""

    every: Positive = 10
    samples_every: Count = 0
    samples: Positive = 16
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
        other = "tilt" if self.stage == "cold_start" else "cold_start"
        if other in self.model_fields_set:
            raise ValueError(f"the section {other} is given, but stage is {self.stage}")
        _check_model(self.model)
        _check_batch(self.train)
        _check_run(self.run, self.adapters)
        if self.model.base_storage is not None:
            _check_base_storage(self)
        if self.stage == "cold_start":
            if self.rewards:
                raise ValueError(
                    f"rewards ({', '.join(self.rewards)}) are given, but stage cold_start trains "
                    "on none; put them under watch.rewards to log them"
                )
            if self.cold_start.reuse > self.sampler.steps:
                raise ValueError(
                    f"cold_start.reuse {self.cold_start.reuse} is more than the "
                    f"{self.sampler.steps} boundaries of sampler.steps {self.sampler.steps}"
                )
        else:
            _check_tilt(self)
        _check_watch(self)
        return self


def _check_model(model: ModelConfig) -> None:
    if model.resolution is not None and model.resolution % 8:
        raise ValueError(f"model.resolution is {model.resolution}, which is no multiple of 8")
    if model.family == "mixture" and model.path != "mixture":
        raise ValueError(
            f"model.family mixture needs model.path mixture (no files), not {model.path}"
        )
    if model.path == "mixture" and model.compile:
        raise ValueError("model.compile is for pipelines, not for the mixture")
    if model.path == "mixture" and model.family not in (None, "mixture"):
        raise ValueError(f"model.path mixture needs model.family mixture, not {model.family}")


def _check_base_storage(config: RunConfig) -> None:
    key = f"model.base_storage {config.model.base_storage}"
    if config.model.path == "mixture":
        raise ValueError(f"{key} is for pipelines, not for the mixture")
    if config.adapters.kind != "lora":
        raise ValueError(f"{key} is for the frozen base of LoRAs, so adapters.kind is lora")
    if config.run.sharding != "replicated":
        raise ValueError(f"{key} cannot be sharded, so run.sharding is replicated")
    if not {"generator", "fake_score"} <= config.model.checkpointed:
        raise ValueError(
            f"{key} saves no memory unless model.gradient_checkpointing is true or has generator "
            "and fake_score: the backward pass would keep every matrix in model.dtype"
        )


def _check_batch(train: TrainConfig) -> None:
    if train.batch_size % train.micro:
        raise ValueError(
            f"train.micro_batch_size {train.micro} does not divide "
            f"train.batch_size {train.batch_size}"
        )


def _check_run(run: RunSection, adapters: AdaptersConfig) -> None:
    if run.resume_from != "latest" and not run.resume:
        raise ValueError(f"run.resume_from {run.resume_from} is given, but run.resume is false")
    if run.sharding == "fsdp2" and adapters.kind != "lora":
        raise ValueError("run.sharding fsdp2 shards the base of LoRAs, so adapters.kind is lora")


def _check_watch(config: RunConfig) -> None:
    watch = config.watch
    if watch.stop and (config.stage == "cold_start" or not watch.rewards):
        raise ValueError("watch.stop needs stage tilt and at least one reward under watch.rewards")
    if config.stage == "tilt" and watch.rewards and watch.prompts < 8:
        raise ValueError(
            f"watch.prompts is {watch.prompts}, but no test can tell a change from chance with "
            "fewer than 8"
        )


def _check_tilt(config: RunConfig) -> None:
    tilt, train, sampler = config.tilt, config.train, config.sampler
    if config.model.few_step is None:
        raise ValueError(
            "stage tilt needs model.few_step, the stage-1 run directory or LoRA to start from"
        )
    if not config.rewards:
        raise ValueError("stage tilt needs at least one reward under rewards")
    for name, reward in config.rewards.items():
        if reward.weight == 0:
            raise ValueError(
                f"rewards.{name} has weight 0, which trains nothing; put it under watch.rewards"
            )
    if train.batch_size % tilt.group_size:
        raise ValueError(
            f"tilt.group_size {tilt.group_size} does not divide train.batch_size {train.batch_size}"
        )
    if tilt.group_size % train.micro and train.micro % tilt.group_size:
        raise ValueError(
            f"train.micro_batch_size {train.micro} must divide tilt.group_size {tilt.group_size} "
            "or be a multiple of it"
        )
    if tilt.reward_steps > sampler.steps:
        raise ValueError(
            f"tilt.reward_steps {tilt.reward_steps} is more than sampler.steps {sampler.steps}"
        )
    left = sampler.steps - tilt.reward_steps
    if tilt.policy_weight > 0 and tilt.subset > left:
        taken = (
            f" that tilt.reward_steps {tilt.reward_steps} leaves" if tilt.reward_steps > 1 else ""
        )
        raise ValueError(
            f"tilt.subset {tilt.subset} is more than the {left} stochastic "
            f"step{'' if left == 1 else 's'} of sampler.steps {sampler.steps}{taken}"
        )
    if sampler.eta == 0 and tilt.policy_weight > 0:
        raise ValueError(
            f"sampler.eta 0 makes every step deterministic, but tilt.policy_weight "
            f"{tilt.policy_weight} trains stochastic ones"
        )
    if tilt.policy_weight == tilt.matching_weight == tilt.reward_weight == 0:
        raise ValueError(
            "tilt.policy_weight, tilt.matching_weight and tilt.reward_weight are all 0"
        )
