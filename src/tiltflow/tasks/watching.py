"""The watch of a run, put together from its config (docs/watch.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiltflow.config.load import RewardConfig, RunConfig
from tiltflow.core.distributed import Ranks
from tiltflow.core.metrics import ANEW
from tiltflow.evaluation.diversity import features_of, last_clip
from tiltflow.evaluation.watch.history import FILE, History, anew
from tiltflow.evaluation.watch.probes import FixedPrompts, Probes, ProbeSettings
from tiltflow.evaluation.watch.watch import Watch
from tiltflow.models.medium import Features
from tiltflow.models.roles import Role
from tiltflow.rewards.combine import RewardMixture
from tiltflow.rewards.frames import for_medium
from tiltflow.setup.assemble import build_rewards
from tiltflow.setup.build import Build
from tiltflow.setup.watch_facts import reward_facts, series_digests
from tiltflow.setup.watch_prompts import too_few_texts
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.training.loop import Watched
from tiltflow.training.tilt import Tilt


def build_watch(
    cfg: RunConfig,
    build: Build,
    fixed: FixedPrompts,
    out: Path,
    start: int,
    say: Callable[[str], None],
    ranks: Ranks,
) -> Watch:
    """The watch of a stage-2 run that starts at step `start`; its memory is `out`/watch.jsonl.

    Every rank watches, rank 0 writes the memory down.
    """
    stage, chosen = build.stage, cfg.watch
    assert isinstance(stage, Tilt)
    backbone = build.backbone
    held_out = build_rewards(chosen.rewards, backbone)
    features, clip = _features(cfg, build, held_out, stage.rewards)
    if features is None:
        say("watch: no reward is a CLIP and watch.clip is unset: diversity not measured")
    few = too_few_texts(chosen, [prompt.text for prompt in fixed.encoded.prompts])
    if few is not None:
        say(f"watch: {few}")
    settings = ProbeSettings(
        samples=chosen.prompts,
        groups=min(chosen.diversity_prompts, chosen.prompts),
        draws=chosen.diversity_images,
        teacher_samples=min(chosen.teacher_images, chosen.prompts),
        teacher_sigmas=backbone.teacher_sigmas(chosen.teacher_steps),
        guidance=stage.matching.guidance,
        levels=chosen.levels,
        cutoff=chosen.frequency,
    )
    probes = Probes(
        fixed,
        stage.roles,
        held_out,
        stage.rewards,
        features,
        settings,
    )
    # as in the log, a run that died before its first save starts over
    history = History(out / FILE, start if start else -1, write=ranks.main)
    loaded = {"held_out": held_out, "trained": stage.rewards}
    digests = series_digests(cfg, backbone, fixed, settings, clip, loaded)
    changed = anew(history.rows, digests)
    if changed:
        say(
            f"watch: {', '.join(changed)}: measured otherwise than before (other settings, prompts "
            "or weights), so the next look is their new reference"
        )
    weights = stage.rewards.advantage_weights
    return Watch(probes.measure, chosen.rules, weights, history, digests)


def _features(
    cfg: RunConfig, build: Build, held_out: RewardMixture, trained: RewardMixture
) -> tuple[Features | None, dict[str, Any] | None]:
    """What diversity is measured in: the medium's own features, or a CLIP's and what that is; None
    without one.

    The CLIP is that of `watch.clip`, else of the last CLIP among the held-out rewards, else of
    the last among the trained ones.
    """
    medium = build.backbone.medium
    if cfg.watch.clip is not None and medium.features is None:
        from tiltflow.rewards.zoo.clip_family import CLIPScore

        clip = RewardConfig(weight=0, path=cfg.watch.clip)
        seen = for_medium(CLIPScore(cfg.watch.clip, device=build.backbone.device), medium)
        return seen.image_features, reward_facts("clipscore", clip)  # type: ignore[attr-defined]
    rewards = [item.reward for item in (*trained.rewards, *held_out.rewards)]
    last = last_clip(rewards)
    if medium.features is not None or last is None:
        return medium.features, None
    table = cfg.rewards if last < len(trained.rewards) else cfg.watch.rewards
    name = rewards[last].name
    facts = reward_facts(name, table[name]) if name in table else {"name": name}
    return features_of(medium, rewards), facts


def held_out(
    fixed: FixedPrompts, role: Role, rewards: RewardMixture, count: int
) -> dict[str, float]:
    """The mean of each held-out reward on the fixed prompts and noise: all of it in stage 1."""
    mine = fixed.ranks.spread(count)
    images = fixed.images(role, count)[mine].to(role.backbone.device)
    chosen = [fixed.encoded.prompts[i] for i in mine]
    scores = rewards.score(images, [p.text for p in chosen], [p.metadata for p in chosen])
    whole = {name: fixed.ranks.collect(v.cpu(), count) for name, v in scores.items()}
    return {f"held_out/{name}": float(values.mean()) for name, values in whole.items()}


def look(watch: Watch, done: int, callbacks: Callbacks) -> Watched:
    """One look, as the loop takes it; the callbacks see its alarms, too."""
    seen = watch(done)
    for text in seen.alarms.values():
        callbacks.alarm(done, text)
    begins = ", ".join(watch.logged_as(name) for name in watch.renewed)
    notes = {ANEW: begins} if begins else {}
    return Watched(watch.metrics(seen), seen.alarms, notes)
