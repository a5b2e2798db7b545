"""From a validated config to the objects of a run: the config stops here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.backbones import load_backbone
from tiltflow.backbones.base import Backbone
from tiltflow.checkpoint import load_checkpoint
from tiltflow.config import RewardConfig, RunConfig
from tiltflow.embeddings import EncodedPrompts, encode_prompts
from tiltflow.export import read_adapter
from tiltflow.paths import resolve_path
from tiltflow.prompts import Prompt, PromptSampler, load_prompts
from tiltflow.randomness import Randomness
from tiltflow.rewards.base import load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted
from tiltflow.roles import AdapterSettings, Roles, State, adapter_roles, copy_roles
from tiltflow.train.cold_start import ColdStart
from tiltflow.train.optim import Updater, constant, cosine
from tiltflow.train.tilt import Tilt, TiltSettings
from tiltflow.train.updates import FakeScoreTrainer, Matching

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Start:
    """What stage 2 takes from stage 1: the EMA's weights, the fake score's, the adapter's shape."""

    few_step: State
    fake_score: State | None
    settings: AdapterSettings | None


@dataclass(frozen=True)
class Build:
    """A stage ready to run, and what the commands need beside it."""

    stage: ColdStart | Tilt
    backbone: Backbone
    prompts: EncodedPrompts
    facts: dict[str, Any]


def device_of(name: str) -> torch.device:
    """The device of `run.device`; "auto" is the accelerator if there is one, else the CPU."""
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    return torch.device(name)


def build_backbone(cfg: RunConfig) -> Backbone:
    model = cfg.model
    return load_backbone(
        resolve_path(model.path),
        family="mixture" if model.path == "mixture" else model.family,
        generator_path=resolve_path(model.generator_path) if model.generator_path else None,
        device=device_of(cfg.run.device),
        dtype=DTYPES[model.dtype],
        vae_dtype=DTYPES[model.vae_dtype] if model.vae_dtype else None,
        resolution=model.resolution,
        max_sequence_length=model.max_sequence_length,
    )


def adapter_settings(cfg: RunConfig, backbone: Backbone) -> AdapterSettings:
    chosen = cfg.adapters
    targets = chosen.targets if chosen.targets is not None else backbone.lora_targets()
    return AdapterSettings(
        chosen.rank, chosen.alpha, targets if isinstance(targets, str) else list(targets)
    )


def load_start(run: Path) -> Start:
    """Stage 1's result: from its run directory, or from an exported LoRA folder.

    A LoRA folder has no fake score: that starts from the teacher again.

    Raises:
        ValueError: if the directory holds neither a complete stage-1 checkpoint nor a LoRA.
    """
    if not (run / "checkpoints").is_dir():
        settings, weights = read_adapter(run)
        return Start(weights, None, settings)
    checkpoint = load_checkpoint(run)
    if checkpoint.state.get("stage") != "cold_start":
        raise ValueError(f"model.few_step={run} is not a cold_start run")
    adapters = checkpoint.state["adapters"]
    return Start(
        dict(checkpoint.tensors["ema"]),
        dict(checkpoint.tensors["fake_score"]),
        AdapterSettings(**adapters) if adapters else None,
    )


def build_roles(cfg: RunConfig, backbone: Backbone, start: Start | None) -> Roles:
    """Adapters over one base, or separate copies, as `adapters.kind` says."""
    autocast = DTYPES[cfg.model.autocast] if cfg.model.autocast else None
    common: dict[str, Any] = {
        "seed": cfg.run.seed,
        "fake_score": start.fake_score if start else None,
        "checkpointing": cfg.model.gradient_checkpointing,
        "autocast": autocast,
    }
    if cfg.adapters.kind == "copies":
        return copy_roles(backbone, few_step=start.few_step if start else None, **common)
    below = None
    if start is not None:
        if start.settings is None:
            raise ValueError(
                "model.few_step was trained with adapters.kind=copies and adapters.kind is lora"
            )
        below = (start.settings, start.few_step)
    settings = adapter_settings(cfg, backbone)
    try:
        return adapter_roles(backbone, settings, few_step=below, **common)
    except ValueError as error:
        if below is None:
            raise
        below_path, model = cfg.model.few_step, cfg.model.path
        raise ValueError(f"model.few_step={below_path} does not fit {model}: {error}") from error


def build_rewards(table: dict[str, RewardConfig], device: torch.device) -> RewardMixture:
    """Loads every reward of a config table; weights and back-propagation as configured."""
    loaded = []
    for name, reward in table.items():
        made = load_reward(name, path=reward.path, device=str(device), options=reward.options)
        loaded.append(Weighted(made, reward.weight, reward.backprop))
    return RewardMixture(loaded)


def build_stage(cfg: RunConfig, progress: Callable[[str], None] = lambda message: None) -> Build:
    """Loads the model, encodes the prompts, and puts the stage together."""
    progress(f"loading {cfg.model.path}")
    backbone = build_backbone(cfg)
    prompts = load_prompts(cfg.data.prompts)
    progress(f"encoding {len(prompts)} prompts")
    encoded = encode_prompts(backbone, prompts)
    start = load_start(Path(cfg.model.few_step)) if cfg.model.few_step else None
    roles = build_roles(cfg, backbone, start)
    lora = cfg.adapters.kind == "lora"
    settings = adapter_settings(cfg, backbone) if lora else None
    facts = {
        "stage": cfg.stage,
        "adapters": vars(settings) if settings else None,
        "few_step_adapters": vars(start.settings) if start and start.settings else None,
        "steps": cfg.sampler.steps,
        "eta": cfg.sampler.eta,
    }
    make = _cold_start if cfg.stage == "cold_start" else _tilt
    stage = make(cfg, backbone, encoded, roles, backbone.few_step_sigmas(cfg.sampler.steps))
    return Build(stage, backbone, encoded, facts)


def _updater(cfg: RunConfig, roles: Roles, which: str) -> Updater:
    train = cfg.train
    lr = train.generator_lr if which == "generator" else train.fake_score_lr
    shape = cosine if train.schedule == "cosine" else constant
    schedule = partial(shape, steps=train.steps, warmup=train.warmup)
    return Updater(getattr(roles, which), lr, train.betas, train.weight_decay, train.clip, schedule)


def _common(
    cfg: RunConfig, backbone: Backbone, encoded: EncodedPrompts, roles: Roles, sigmas: Tensor
) -> dict[str, Any]:
    """What both stages are made of."""
    randomness, eta = Randomness(cfg.run.seed), cfg.sampler.eta
    micro = cfg.train.micro
    chosen = cfg.cold_start if cfg.stage == "cold_start" else cfg.tilt
    fake = FakeScoreTrainer(
        role=roles.fake_score,
        updater=_updater(cfg, roles, "fake_score"),
        randomness=randomness,
        eta=eta,
        micro=micro,
        consistency=chosen.consistency,
        form=cfg.cold_start.consistency_form,
        max_delta=cfg.cold_start.consistency_max_delta,
    )
    guidance = cfg.model.guidance if cfg.model.guidance is not None else backbone.guidance
    return {
        "roles": roles,
        "prompts": encoded,
        "sampler": PromptSampler(len(encoded), randomness),
        "randomness": randomness,
        "fake": fake,
        "matching": Matching(roles.teacher, roles.fake_score, randomness, guidance, eta, micro),
        "updater": _updater(cfg, roles, "generator"),
        "sigmas": sigmas,
        "latent_shape": backbone.latent_shape,
        "eta": eta,
        "batch": cfg.train.batch_size,
        "micro": micro,
        "ema": cfg.train.ema,
    }


def _cold_start(cfg: RunConfig, *parts: Any) -> ColdStart:
    return ColdStart(**_common(cfg, *parts), generator_every=cfg.cold_start.generator_every)


def _tilt(cfg: RunConfig, *parts: Any) -> Tilt:
    backbone: Backbone = parts[0]
    tilt = cfg.tilt
    settings = TiltSettings(
        group_size=tilt.group_size,
        subset=tilt.subset,
        clip_range=tilt.clip_range,
        advantage_clip=tilt.advantage_clip,
        kl=tilt.kl,
        log_prob=tilt.log_prob,
        policy_weight=tilt.policy_weight,
        matching_weight=tilt.matching_weight,
        reward_weight=tilt.reward_weight,
        reward_target=tilt.reward_target,
        match_steps=tilt.match_steps,
        fake_score_updates=tilt.fake_score_updates,
        decode_chunk=tilt.decode_chunk or cfg.train.micro,
    )
    rewards = build_rewards(cfg.rewards, backbone.device)
    return Tilt(**_common(cfg, *parts), rewards=rewards, settings=settings)


def eval_prompts(cfg: RunConfig) -> list[Prompt]:
    """The prompts that samples and the watch use: data.eval_prompts, else the training ones."""
    return load_prompts(cfg.data.eval_prompts or cfg.data.prompts)
