"""Which values of a run configuration go together (METHOD §4–§6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiltflow.core.sizes import both, said
from tiltflow.evaluation.watch.settings import FEWEST_SAMPLES
from tiltflow.models.family import graph_families, has_files
from tiltflow.rewards.remote.address import ELSEWHERE
from tiltflow.rewards.remote.asking import refuse_ranks, settings_elsewhere

if TYPE_CHECKING:
    from tiltflow.config.schema import (
        AdaptersConfig,
        ModelConfig,
        RunConfig,
        RunSection,
        SamplerConfig,
    )


def check_together(config: RunConfig) -> None:
    """Holds the sections against each other.

    Raises:
        ValueError: in one sentence, the first values that do not go together.
    """
    other = "tilt" if config.stage == "cold_start" else "cold_start"
    if other in config.model_fields_set:
        raise ValueError(f"the section {other} is given, but stage is {config.stage}")
    _check_model(config.model)
    _check_run(config.run, config.adapters)
    if config.model.graphs is True:
        _check_graphs(config)
    if config.model.base_storage is not None:
        _check_base_storage(config)
    if config.stage == "cold_start":
        _check_cold_start(config)
    else:
        _check_tilt(config)
    if config.data.buckets is not None:
        _check_buckets(config)
    _check_watch(config)
    _check_choices(config)
    for rewards in (config.rewards, config.watch.rewards):
        for name, reward in rewards.items():
            if name.startswith(ELSEWHERE):
                settings_elsewhere(name, reward.options, reward.path)
    for name, reward in config.watch.rewards.items():
        refuse_ranks(name, reward.options)


def _check_cold_start(config: RunConfig) -> None:
    if config.rewards:
        raise ValueError(
            f"rewards ({', '.join(config.rewards)}) are given, but stage cold_start trains "
            "on none; put them under watch.rewards to log them"
        )
    if config.cold_start.reuse > config.sampler.least:
        raise ValueError(
            f"cold_start.reuse {config.cold_start.reuse} is more than the "
            f"{config.sampler.least} boundaries of {_least(config.sampler)}"
        )
    if config.cold_start.boundary_order == "phased" and config.cold_start.reuse > 1:
        raise ValueError(
            f"cold_start.reuse {config.cold_start.reuse} takes several boundaries of a rollout, "
            "but with cold_start.boundary_order phased a phase has one"
        )


def _check_model(model: ModelConfig) -> None:
    if model.resolution is not None and any(side % 8 for side in both(model.resolution)):
        raise ValueError(f"model.resolution is {said(model.resolution)}, which is no multiple of 8")
    if model.has_files:
        return
    if has_files(model.path):
        family = model.family
        raise ValueError(
            f"model.family {family} needs model.path {family} (no files), not {model.path}"
        )
    if model.compile:
        raise ValueError(f"model.compile is for pipelines, not for the {model.path}")
    if model.family not in (None, model.path):
        raise ValueError(
            f"model.path {model.path} needs model.family {model.path}, not {model.family}"
        )


def _check_graphs(config: RunConfig) -> None:
    """What is recorded must lie where it is, be launched by hand otherwise, and read no host."""
    key, model = "model.graphs true", config.model
    if not model.graphable:
        raise ValueError(f"{key} is for pipelines of family {', '.join(graph_families())}")
    if model.compile:
        raise ValueError(f"{key} and model.compile true exclude each other: set one of them")
    if model.base_storage is not None:
        raise ValueError(
            f"{key} and model.base_storage {model.base_storage} exclude each other: a cast matrix "
            "does not stay where a graph reads it"
        )
    if config.adapters.kind != "lora" or config.run.sharding != "replicated":
        raise ValueError(f"{key} needs adapters.kind lora and run.sharding replicated")


def _check_base_storage(config: RunConfig) -> None:
    key = f"model.base_storage {config.model.base_storage}"
    if not config.model.has_files:
        raise ValueError(f"{key} is for pipelines, not for the {config.model.path}")
    if config.adapters.kind != "lora":
        raise ValueError(f"{key} is for the frozen base of LoRAs, so adapters.kind is lora")
    if config.run.sharding != "replicated":
        raise ValueError(f"{key} cannot be sharded, so run.sharding is replicated")
    if config.model.compile:
        raise ValueError(
            f"{key} and model.compile true exclude each other: what is compiled does not recompute "
            "what it computed"
        )
    if not {"generator", "fake_score"} <= config.model.checkpointed:
        raise ValueError(
            f"{key} saves no memory unless model.gradient_checkpointing is true or has generator "
            "and fake_score: the backward pass would keep every matrix in model.dtype"
        )


def _check_run(run: RunSection, adapters: AdaptersConfig) -> None:
    if run.resume_from != "latest" and not run.resume:
        raise ValueError(f"run.resume_from {run.resume_from} is given, but run.resume is false")
    if run.sharding == "fsdp2" and adapters.kind != "lora":
        raise ValueError("run.sharding fsdp2 shards the base of LoRAs, so adapters.kind is lora")


def _check_buckets(config: RunConfig) -> None:
    model, buckets = config.model, config.data.buckets
    if not model.has_files:
        raise ValueError(f"data.buckets are sizes of pictures, and the {model.path} makes none")
    if isinstance(buckets, str) or buckets is None:
        return
    sizes = [both(bucket.size) for bucket in buckets]
    for size in sizes:
        if any(side % 8 for side in size):
            raise ValueError(f"data.buckets has {said(size)}, which is no multiple of 8")
        if sizes.count(size) > 1:
            raise ValueError(f"data.buckets has {said(size)} twice: give it a weight instead")


def _check_watch(config: RunConfig) -> None:
    watch = config.watch
    if watch.stop and (config.stage == "cold_start" or not watch.rewards):
        raise ValueError("watch.stop needs stage tilt and at least one reward under watch.rewards")
    if config.stage == "cold_start" or not watch.rewards:
        return
    for key in ("prompts", "diversity_prompts", "teacher_images"):
        if getattr(watch, key) < FEWEST_SAMPLES:
            raise ValueError(
                f"watch.{key} is {getattr(watch, key)}, but no test can tell a change from chance "
                f"with fewer than {FEWEST_SAMPLES}"
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
    if tilt.reward_steps > sampler.least:
        raise ValueError(f"tilt.reward_steps {tilt.reward_steps} is more than {_least(sampler)}")
    left = sampler.least - tilt.reward_steps
    if tilt.policy_weight > 0 and tilt.subset > left:
        taken = (
            f" that tilt.reward_steps {tilt.reward_steps} leaves" if tilt.reward_steps > 1 else ""
        )
        raise ValueError(
            f"tilt.subset {tilt.subset} is more than the {left} stochastic "
            f"step{'' if left == 1 else 's'} of {_least(sampler)}{taken}"
        )
    if tilt.kl > 0 and tilt.policy_weight == 0:
        raise ValueError(
            f"tilt.kl {tilt.kl:g} is a part of the policy's loss, but tilt.policy_weight is 0"
        )
    if sampler.eta == 0 and tilt.policy_weight > 0:
        raise ValueError(
            f"sampler.eta 0 makes every step deterministic, but tilt.policy_weight "
            f"{tilt.policy_weight} trains stochastic ones"
        )
    if tilt.matching_weight > 0 and tilt.fake_score_updates == 0:
        raise ValueError(
            "tilt.fake_score_updates is 0, but the matching of tilt.matching_weight "
            f"{tilt.matching_weight:g} needs a fake score that follows the generator"
        )
    if tilt.policy_weight == tilt.matching_weight == tilt.reward_weight == 0 and not tilt.terms:
        raise ValueError(
            "tilt.policy_weight, tilt.matching_weight and tilt.reward_weight are all 0"
        )


def _least(sampler: SamplerConfig) -> str:
    """The number of steps that all must fit, in words."""
    return f"{'the smallest ' * (len(sampler.grids) > 1)}sampler.steps {sampler.least}"


def _check_choices(config: RunConfig) -> None:
    """Raises ValueError for choices of which one makes the other mean nothing."""
    cold, lora = config.cold_start, config.adapters.kind == "lora"
    if cold.fresh_boundary and cold.keep_graph:
        raise ValueError(
            "cold_start.keep_graph is of the boundary samples that both updates share, and "
            "cold_start.fresh_boundary gives the generator's its own: choose one"
        )
    if config.tilt.fake_score_start == "fresh" and not lora:
        raise ValueError("tilt.fake_score_start fresh is of LoRAs, so adapters.kind is lora")
    if config.adapters.init_std is not None and not lora:
        raise ValueError("adapters.init_std is of LoRAs, so adapters.kind is lora")
    if config.train.ema_every == "iteration" and config.stage == "tilt":
        raise ValueError(
            "train.ema_every iteration is of stage cold_start: in stage tilt every iteration is an "
            "update"
        )
