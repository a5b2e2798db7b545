"""What a watch's values depend on beside the generator, as a digest for each of its series."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig
from tiltflow.config.schema import RewardConfig
from tiltflow.core.paths import resolve_path
from tiltflow.evaluation.watch.probes import FixedPrompts, ProbeSettings
from tiltflow.models.backbone import Backbone
from tiltflow.rewards.combine import RewardMixture
from tiltflow.rewards.files import of_servers, revisions
from tiltflow.rewards.remote.address import column_of
from tiltflow.rewards.remote.asking import ranks
from tiltflow.setup.held_out import deciding_options
from tiltflow.setup.manifest import configured_fingerprints, prompts_fingerprint


def series_digests(
    cfg: RunConfig,
    backbone: Backbone,
    fixed: FixedPrompts,
    settings: ProbeSettings,
    features: dict[str, Any] | None,
    rewards: Mapping[str, RewardMixture],
) -> dict[str, str]:
    """By the series' names, in a watch of these settings; another digest means that a value cannot
    be held against an earlier one. `features`: the CLIP of diversity, None for the medium's own.
    `rewards`: those of the config as they are loaded, "held_out" and "trained"; a series has the
    name that a reward has then.

    What a digest is of is part of `watch.jsonl`: to add a fact makes every run begin anew.
    """
    common = _of_samples(backbone, fixed, settings.samples)
    teacher = {
        "teacher": [round(float(sigma), 6) for sigma in settings.teacher_sigmas],
        "teacher_samples": settings.teacher_samples,
        "guidance": settings.guidance,
    }
    facts: dict[str, Any] = {
        "diversity": {"groups": settings.groups, "draws": settings.draws, "features": features},
        "drift": teacher | {"levels": list(settings.levels)},
        **{name: teacher | {"cutoff": settings.cutoff} for name in backbone.medium.probes},
    }
    for group, table in (("held_out", cfg.watch.rewards), ("trained", cfg.rewards)):
        facts |= _of_rewards(group, table, rewards[group])
    return {name: _digest(common | {"own": own}) for name, own in facts.items()}


def held_out_digests(
    cfg: RunConfig, backbone: Backbone, fixed: FixedPrompts, samples: int, rewards: RewardMixture
) -> dict[str, str]:
    """Of stage 1's held-out rewards, by their names in the log, as `series_digests`."""
    common = _of_samples(backbone, fixed, samples)
    facts = _of_rewards("held_out", cfg.watch.rewards, rewards)
    return {name: _digest(common | {"own": own}) for name, own in facts.items()}


def _of_samples(backbone: Backbone, fixed: FixedPrompts, count: int) -> dict[str, Any]:
    """What the first `count` samples depend on beside the generator."""
    return {
        "prompts": prompts_fingerprint(fixed.encoded.prompts[:count]),
        "samples": count,
        "shape": list(backbone.latent_shape),
        "sigmas": [round(float(sigma), 6) for sigma in fixed.sigmas],
        "eta": fixed.eta,
    }


def _of_rewards(
    group: str, table: Mapping[str, RewardConfig], loaded: RewardMixture
) -> dict[str, dict[str, Any]]:
    """By series, what the scores of a config's rewards depend on."""
    scored = [name for name, of in table.items() if not ranks(name, of.options)]
    found = {}
    for name, each in zip(scored, loaded.rewards, strict=True):
        server = of_servers({"server": each.reward}, "contents")
        found[f"{group}/{each.reward.name}"] = reward_facts(name, table[name]) | server
    return found


def reward_facts(name: str, of: RewardConfig) -> dict[str, Any]:
    """What a reward's scores depend on: neither its weight nor how many images it gets at once."""
    return {
        "name": column_of(name),  # a server may be at another address
        "path": None if of.path is None or Path(resolve_path(of.path)).exists() else of.path,
        "options": deciding_options(name, of.options),
        "files": configured_fingerprints({name: of}),
        "revision": revisions([name]),
        **({} if of.frames is None else {"frames": of.frames}),
    }


def _digest(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
