"""From a config and what was loaded for it to a stage: every setting goes to its object here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tiltflow.config.load import RewardConfig, RunConfig
from tiltflow.core.distributed import Ranks
from tiltflow.core.randomness import Randomness
from tiltflow.core.sizes import said, same_as
from tiltflow.core.transfer import to_device
from tiltflow.data.buckets import Bucket, by_column
from tiltflow.data.columns import weights_of
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import Prompt, PromptSampler
from tiltflow.models.backbone import Backbone
from tiltflow.models.medium import IMAGES
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.resized import resized
from tiltflow.models.roles import Role, Roles
from tiltflow.rewards.base import check_medium, load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted
from tiltflow.rewards.frames import for_medium
from tiltflow.rewards.ranking import WeightedRanker
from tiltflow.rewards.remote.asking import ranks
from tiltflow.rewards.remote.loading import load_ranker
from tiltflow.training.averaging import Averaging
from tiltflow.training.buckets import Bucketed
from tiltflow.training.cold_start import ColdStart, Cycle
from tiltflow.training.loop import Stage
from tiltflow.training.objective import make_objective
from tiltflow.training.optim import Guard, Updater, constant, cosine
from tiltflow.training.own_terms import make_terms
from tiltflow.training.parts import Parts
from tiltflow.training.scoring import Scorer
from tiltflow.training.settings import TrainConfig
from tiltflow.training.terms import Match, Policy, Pull, Span
from tiltflow.training.tilt import Tilt
from tiltflow.training.updates import FakeScoreTrainer, Matching, Share


def make_stages(
    cfg: RunConfig,
    backbone: Backbone,
    encoded: EncodedPrompts,
    roles: Roles,
    share: Share,
    rewards: RewardMixture | None = None,
) -> tuple[ColdStart | Tilt, Stage]:
    """The stage at the model's own size and its most steps, and what is run: that stage, or, with
    `data.buckets` and several `sampler.steps`, one for each size and each number of steps over the
    same parts. `rewards` are the config's, where they have been made.

    Raises:
        ValueError: if a term, an objective or a reward that the config names cannot be made, or a
            size does not fit the model.
    """
    parts = _parts(cfg, backbone, encoded, roles, share)
    if cfg.stage == "tilt" and rewards is None:
        rewards = build_rewards(cfg.rewards, backbone)

    def make(parts: Parts) -> ColdStart | Tilt:
        return _cold_start(cfg, parts) if rewards is None else _tilt(cfg, backbone, parts, rewards)

    grids, buckets = cfg.sampler.grids, buckets_of(cfg, encoded.prompts)
    stage = make(_on_grid(parts, backbone, grids, grids[-1]))
    if not buckets and len(grids) == 1:
        return stage, stage
    if set(stage.updaters) != set(parts.updaters):
        several, one = ("data.buckets", "size") if buckets else ("sampler.steps", "number of steps")
        raise ValueError(f"{several}: a term of tilt.terms that is trained itself has one {one}")
    every, reuse = cfg.cold_start.generator_every, cfg.cold_start.reuse

    def rollout(step: int) -> int:
        return step if cfg.stage == "tilt" else Cycle.of(step, reuse, every).number

    drawn = partial(Bucketed, number=rollout, randomness=parts.randomness)

    def over_grids(parts: Parts, backbone: Backbone) -> ColdStart | Tilt | Bucketed:
        stages = [make(_on_grid(parts, backbone, grids, steps)) for steps in grids]
        if len(stages) == 1:
            return stages[0]
        names, weights = tuple(f"{steps}-step" for steps in grids), (1.0,) * len(grids)
        return drawn(names=names, weights=weights, stages=tuple(stages), stream="grid")

    if not buckets:
        return stage, over_grids(parts, backbone)
    return stage, drawn(
        names=tuple(said(bucket.size) for bucket in buckets),
        weights=tuple(bucket.weight for bucket in buckets),
        stages=tuple(over_grids(*_sized(backbone, parts, bucket)) for bucket in buckets),
        stream="size",
    )


def buckets_of(cfg: RunConfig, prompts: Sequence[Prompt]) -> list[Bucket]:
    """The sizes of `data.buckets`; none where there are none.

    Raises:
        ValueError: if a prompt has none in the column that is named.
    """
    chosen = cfg.data.buckets
    if isinstance(chosen, str):
        return by_column(chosen, prompts, weights_of(cfg.data.columns.weight, prompts))
    return [Bucket(same_as(bucket.size), bucket.weight) for bucket in chosen or ()]


def _on_grid(parts: Parts, backbone: Backbone, grids: Sequence[int], steps: int) -> Parts:
    """The parts of a stage with `steps` sampler steps, one of the `grids`: its noise levels, and,
    where each boundary has a fake score of its own, those of its boundaries."""
    own = replace(parts, sigmas=to_device(backbone.few_step_sigmas(steps), backbone.device))
    whole = parts.roles.fake_score
    if not whole.boundaries or len(grids) == 1:
        return own
    before = sum(grids[: grids.index(steps)])
    fake = replace(whole, boundaries=whole.boundaries[before : before + steps])
    return replace(
        own,
        roles=replace(parts.roles, fake_score=fake),
        fake=replace(parts.fake, role=fake),
        matching=replace(parts.matching, fake_score=fake),
    )


def _sized(backbone: Backbone, parts: Parts, bucket: Bucket) -> tuple[Parts, Backbone]:
    """The parts of a stage at another size, latents and prompts, and the backbone that knows its
    noise levels; the rest is shared."""
    if not isinstance(backbone, PipelineBackbone):
        raise ValueError(f"data.buckets: family {backbone.family} makes pictures of one size only")
    sized = resized(backbone, bucket.size)
    own = parts.sampler if bucket.prompts is None else parts.sampler.of(bucket.prompts)
    return replace(parts, sampler=own, latent_shape=sized.latent_shape), sized


def build_rewards(table: dict[str, RewardConfig], backbone: Backbone) -> RewardMixture:
    """Loads every reward of a config table; weights and back-propagation as configured.

    Raises:
        ValueError: if one does not load, or scores another medium than the backbone's.
    """
    loaded, rankers, device = [], [], str(backbone.device)
    for name, reward in table.items():
        if ranks(name, reward.options):
            if reward.frames is not None:
                raise ValueError(f"reward {name!r} ranks images, so it takes no frames")
            ranker = load_ranker(name, reward.options, reward.path, device)
            rankers.append(WeightedRanker(ranker, reward.weight))
            continue
        made = load_reward(name, path=reward.path, device=device, options=reward.options)
        made = for_medium(made, backbone.medium, reward.frames)
        check_medium([made], backbone.medium)
        loaded.append(Weighted(made, reward.weight, reward.backprop))
    if rankers and backbone.medium.name != IMAGES.name:
        raise ValueError(
            f"reward {rankers[0].ranker.name!r} ranks images, but here {backbone.medium.name} are "
            "generated"
        )
    return RewardMixture(loaded, rankers)


def _updaters(train: TrainConfig, roles: Roles, ranks: Ranks) -> tuple[Updater, Updater]:
    """The generator's and the fake score's, under one guard."""
    shape = cosine if train.schedule == "cosine" else constant
    schedule, guard = partial(shape, steps=train.steps, warmup=train.warmup), Guard()

    def made(role: Role, lr: float, decay: float) -> Updater:
        return Updater(role, lr, train.betas, decay, train.clip, schedule, ranks, guard)

    own = train.fake_score_weight_decay
    fake_decay = train.weight_decay if own is None else own
    return (
        made(roles.generator, train.generator_lr, train.weight_decay),
        made(roles.fake_score, train.fake_score_lr, fake_decay),
    )


def _parts(
    cfg: RunConfig, backbone: Backbone, encoded: EncodedPrompts, roles: Roles, share: Share
) -> Parts:
    """What both stages are made of."""
    randomness, eta, train = Randomness(cfg.run.seed), cfg.sampler.eta, cfg.train
    updater, fake_updater = _updaters(train, roles, share.ranks)
    chosen = cfg.cold_start if cfg.stage == "cold_start" else cfg.tilt
    guidance = cfg.model.guidance if cfg.model.guidance is not None else backbone.guidance
    return Parts(
        roles=roles,
        prompts=encoded,
        sampler=PromptSampler(
            len(encoded), randomness, weights=weights_of(cfg.data.columns.weight, encoded.prompts)
        ),
        randomness=randomness,
        fake=FakeScoreTrainer(
            role=roles.fake_score,
            updater=fake_updater,
            randomness=randomness,
            share=share,
            eta=eta,
            consistency=chosen.consistency,
            form=chosen.consistency_form,
            max_delta=chosen.consistency_max_delta,
        ),
        matching=Matching(
            roles.teacher, roles.fake_score, randomness, share, guidance, eta, train.boundary_power
        ),
        updater=updater,
        sigmas=to_device(backbone.few_step_sigmas(cfg.sampler.most), backbone.device),
        latent_shape=backbone.latent_shape,
        eta=eta,
        share=share,
        ema=Averaging(
            train.ema, train.ema_every, train.ema_warmup, train.ema_interval, train.ema_repeats
        ),
    )


def _cold_start(cfg: RunConfig, parts: Parts) -> ColdStart:
    chosen = cfg.cold_start
    follows = make_objective(chosen.objective, chosen.objective_options, parts)
    return ColdStart(**vars(parts), settings=chosen, objective=follows)


def _tilt(cfg: RunConfig, backbone: Backbone, parts: Parts, rewards: RewardMixture) -> Tilt:
    chosen = cfg.tilt
    roles, randomness, steps = parts.roles, parts.randomness, parts.steps
    backprop = chosen.reward_weight > 0 and rewards.has_differentiable
    first = steps - (chosen.reward_steps if backprop else 0)
    path = chosen.reward_normalise and chosen.reward_steps > 1  # a step alone has no state between
    bound = chosen.reward_weight if path else None
    policy = Policy(chosen, roles, randomness, stop=min(first, steps - 1))
    own = make_terms(chosen.terms, parts)
    if any(term.takes_gradient for term in own) and not rewards.has_differentiable:
        raise ValueError(
            "a term of tilt.terms takes the rewards' gradient, but no reward is back-propagated"
        )
    if chosen.policy_weight == 0 < chosen.reward_weight and not own:
        _refuse_unused(rewards)
    whole = parts.share.ranks.size * chosen.group_size
    if rewards.rankers and parts.share.batch % whole:
        raise ValueError(
            f"reward {rewards.rankers[0].ranker.name!r} ranks whole groups, but a "
            f"train.batch_size of {parts.share.batch} gives {parts.share.ranks.size} ranks no "
            f"whole groups of {chosen.group_size}"
        )
    return Tilt(
        **vars(parts),
        settings=chosen,
        rewards=rewards,
        scorer=Scorer(
            rewards,
            backbone.decode,
            parts.share,
            chosen.reward_target,
            chosen.decode_chunk or cfg.train.micro,
            chosen.round_images,
            backbone.medium,
        ),
        policy=policy,
        terms=(
            policy,
            Match(chosen, parts.matching, randomness, steps),
            Pull(chosen, Span(first, steps, bound) if backprop else None),
            *own,
        ),
    )


def _refuse_unused(rewards: RewardMixture) -> None:
    """Raises ValueError for a reward without a gradient, where nothing else takes its scores."""
    used = {item.reward.name for item in rewards.backpropagated}
    for name in rewards.advantage_weights:
        if name not in used:
            raise ValueError(
                f"rewards.{name} is not back-propagated and tilt.policy_weight is 0, so that it "
                "trains nothing; put it under watch.rewards"
            )
