"""What a watch's values depend on beside the generator, as a digest for each of its series."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig
from tiltflow.config.schema import RewardConfig
from tiltflow.core.paths import resolve_path
from tiltflow.evaluation.watch.probes import FixedPrompts, ProbeSettings
from tiltflow.models.backbone import Backbone
from tiltflow.rewards.files import revisions
from tiltflow.setup.held_out import deciding_options
from tiltflow.setup.manifest import configured_fingerprints, prompts_fingerprint


def series_digests(
    cfg: RunConfig,
    backbone: Backbone,
    fixed: FixedPrompts,
    settings: ProbeSettings,
    features: dict[str, Any] | None,
) -> dict[str, str]:
    """By the series' names, in a watch of these settings; another digest means that a value cannot
    be held against an earlier one. `features`: the CLIP of diversity, None for the medium's own.

    What a digest is of is part of `watch.jsonl`: to add a fact makes every run begin anew.
    """
    common = {
        "prompts": prompts_fingerprint(fixed.encoded.prompts[: settings.samples]),
        "samples": settings.samples,
        "shape": list(backbone.latent_shape),
        "sigmas": [round(float(sigma), 6) for sigma in fixed.sigmas],
        "eta": fixed.eta,
    }
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
        facts |= {f"{group}/{name}": reward_facts(name, of) for name, of in table.items()}
    return {name: _digest(common | {"own": own}) for name, own in facts.items()}


def reward_facts(name: str, of: RewardConfig) -> dict[str, Any]:
    """What a reward's scores depend on: neither its weight nor how many images it gets at once."""
    return {
        "name": name,
        "path": None if of.path is None or Path(resolve_path(of.path)).exists() else of.path,
        "options": deciding_options(name, of.options),
        "files": configured_fingerprints({name: of}),
        "revision": revisions([name]),
        **({} if of.frames is None else {"frames": of.frames}),
    }


def _digest(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
