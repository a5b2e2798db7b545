"""From a config and what was loaded for it to a stage: every setting goes to its object here."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tiltflow.config.load import RewardConfig, RunConfig
from tiltflow.core.distributed import Ranks
from tiltflow.core.randomness import Randomness
from tiltflow.core.transfer import to_device
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import PromptSampler
from tiltflow.models.backbone import Backbone
from tiltflow.models.roles import Roles
from tiltflow.rewards.base import check_medium, load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted
from tiltflow.train.averaging import Averaging
from tiltflow.train.cold_start import ColdStart
from tiltflow.train.optim import Guard, Updater, constant, cosine
from tiltflow.train.tilt import Tilt
from tiltflow.train.tilt_settings import TiltSettings
from tiltflow.train.updates import FakeScoreTrainer, Matching, Share


def make_stage(
    cfg: RunConfig, backbone: Backbone, encoded: EncodedPrompts, roles: Roles, share: Share
) -> ColdStart | Tilt:
    """The stage of `cfg.stage`, on one rank's share."""
    make = _cold_start if cfg.stage == "cold_start" else _tilt
    sigmas = backbone.few_step_sigmas(cfg.sampler.steps)
    return make(cfg, backbone, encoded, roles, sigmas, share)


def build_rewards(table: dict[str, RewardConfig], backbone: Backbone) -> RewardMixture:
    """Loads every reward of a config table; weights and back-propagation as configured.

    Raises:
        ValueError: if one does not load, or scores another medium than the backbone's.
    """
    loaded, device = [], str(backbone.device)
    for name, reward in table.items():
        made = load_reward(name, path=reward.path, device=device, options=reward.options)
        check_medium([made], backbone.medium)
        loaded.append(Weighted(made, reward.weight, reward.backprop))
    return RewardMixture(loaded)


def _updater(cfg: RunConfig, roles: Roles, which: str, ranks: Ranks, guard: Guard) -> Updater:
    train = cfg.train
    lr = train.generator_lr if which == "generator" else train.fake_score_lr
    shape = cosine if train.schedule == "cosine" else constant
    schedule = partial(shape, steps=train.steps, warmup=train.warmup)
    role, decay = getattr(roles, which), train.weight_decay
    if which == "fake_score" and train.fake_score_weight_decay is not None:
        decay = train.fake_score_weight_decay
    return Updater(role, lr, train.betas, decay, train.clip, schedule, ranks, guard)


def _common(
    cfg: RunConfig,
    backbone: Backbone,
    encoded: EncodedPrompts,
    roles: Roles,
    sigmas: Tensor,
    share: Share,
) -> dict[str, Any]:
    """What both stages are made of."""
    randomness, eta, guard = Randomness(cfg.run.seed), cfg.sampler.eta, Guard()
    chosen = cfg.cold_start if cfg.stage == "cold_start" else cfg.tilt
    fake = FakeScoreTrainer(
        role=roles.fake_score,
        updater=_updater(cfg, roles, "fake_score", share.ranks, guard),
        randomness=randomness,
        share=share,
        eta=eta,
        consistency=chosen.consistency,
        form=chosen.consistency_form,
        max_delta=chosen.consistency_max_delta,
    )
    guidance = cfg.model.guidance if cfg.model.guidance is not None else backbone.guidance
    return {
        "roles": roles,
        "prompts": encoded,
        "sampler": PromptSampler(len(encoded), randomness),
        "randomness": randomness,
        "fake": fake,
        "matching": Matching(
            roles.teacher,
            roles.fake_score,
            randomness,
            share,
            guidance,
            eta,
            cfg.train.boundary_power,
        ),
        "updater": _updater(cfg, roles, "generator", share.ranks, guard),
        "sigmas": to_device(sigmas, backbone.device),
        "latent_shape": backbone.latent_shape,
        "eta": eta,
        "share": share,
        "ema": Averaging(
            cfg.train.ema,
            cfg.train.ema_every,
            cfg.train.ema_warmup,
            cfg.train.ema_interval,
            cfg.train.ema_repeats,
        ),
    }


def _cold_start(cfg: RunConfig, *parts: Any) -> ColdStart:
    chosen = cfg.cold_start
    return ColdStart(
        **_common(cfg, *parts),
        generator_every=chosen.generator_every,
        reuse=chosen.reuse,
        keep_graph=chosen.keep_graph,
        fresh_boundary=chosen.fresh_boundary,
    )


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
        reward_steps=tilt.reward_steps,
        reward_normalise=tilt.reward_normalise,
        match_steps=tilt.match_steps,
        fake_score_updates=tilt.fake_score_updates,
        decode_chunk=tilt.decode_chunk or cfg.train.micro,
        policy_reduction=tilt.policy_reduction,
        kl_form=tilt.kl_form,
        merge_same_prompts=tilt.merge_same_prompts,
        drop_zero_advantages=tilt.drop_zero_advantages,
        round_images=tilt.round_images,
        keep_graph=tilt.keep_graph is True,
    )
    rewards = build_rewards(cfg.rewards, backbone)
    return Tilt(**_common(cfg, *parts), rewards=rewards, settings=settings)
