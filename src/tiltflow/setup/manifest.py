"""What a run is made of, kept in each of its checkpoints; `train.changes` compares two of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from tiltflow.config.load import PromptSets, RunConfig
from tiltflow.config.schema import ModelConfig, RewardConfig
from tiltflow.core.paths import resolve_path
from tiltflow.core.registry import source
from tiltflow.core.settings import Section
from tiltflow.data.prompts import Prompt
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.fingerprint import (
    adapter_fingerprint,
    encoders_fingerprint,
    files_fingerprint,
    pipeline_fingerprint,
)
from tiltflow.models.roles import State
from tiltflow.rewards.files import files_beside, files_of, revisions
from tiltflow.setup.run_directory import with_absolute_paths
from tiltflow.training.changes import by_key


def manifest_of(
    cfg: RunConfig, sets: PromptSets, few_step: State | None, pipelines: Pipelines | None = None
) -> dict[str, Any]:
    """A run's manifest, as JSON holds it. `few_step` are the weights that stage 2 stands on.

    Raises:
        ValueError: if a pipeline is not where the config says.
    """
    model, other = cfg.model, "tilt" if cfg.stage == "cold_start" else "cold_start"
    return {
        "seed": cfg.run.seed,
        **model_fingerprints(model, pipelines or model.pipelines),
        "few_step": adapter_fingerprint(few_step) if few_step else None,
        "prompts": prompts_fingerprint(sets.train),
        "eval_prompts": prompts_fingerprint(sets.fixed),
        "rewards": configured_fingerprints(cfg.rewards),
        "revisions": revisions(cfg.rewards),
        "code": code_fingerprints(cfg),
        "config": with_absolute_paths(cfg).model_dump(mode="json", exclude={other}),
    }


def model_fingerprints(model: ModelConfig, pipelines: Pipelines) -> dict[str, Any]:
    """The family's name, which weights its pipelines hold, and what `tiltflow.json` and the index
    say beside them."""
    if not model.has_files:
        name = model.path
        return {"family": name, "base": name, "generator_base": None, "encoders": None, "side": {}}
    generator = pipelines.generator
    return {
        "family": check_directory(pipelines.model).name,
        "base": pipeline_fingerprint(pipelines.model),
        "generator_base": None if generator is None else pipeline_fingerprint(generator),
        "encoders": encoders_fingerprint(pipelines.model),
        "side": pipelines.model.side,
        "flags": {
            f"{key}.{name}": value
            for key, at in (("model", pipelines.model), ("generator", generator))
            if at is not None
            for name, value in at.flags.items()
        },
    }


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """The number of the prompts, and a digest of their texts and metadata in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [prompt.text, dict(prompt.metadata)]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return f"{len(prompts)} prompts {digest.hexdigest()[:16]}"


def rewards_fingerprints(rewards: Mapping[str, str | None]) -> dict[str, str]:
    """What the files hold that each reward of a name and path depends on, where there are any: of
    `files_of` by its name, and of `files_beside` by "NAME WHAT"."""
    places = {name: files_of(name, path) for name, path in rewards.items()}
    here = {name: place for name, place in places.items() if place is not None and place.exists()}
    for name, path in rewards.items():
        here |= files_beside(name, path)
    return {name: files_fingerprint(place) for name, place in here.items()}


def configured_fingerprints(rewards: Mapping[str, RewardConfig]) -> dict[str, str]:
    """`rewards_fingerprints` of a config's rewards, and what their options name."""
    return rewards_fingerprints({n: of.path for n, of in rewards.items()}) | _of_options(rewards)


def _of_options(rewards: Mapping[str, RewardConfig]) -> dict[str, str]:
    """What the files and models hold that options name: a rubric, another base. A folder without a
    `config.json` is no model; a judge's cache is one, and fills while it runs."""
    named = {
        f"{name} {option}": resolve_path(value)
        for name, of in rewards.items()
        for option, value in of.options.items()
        if isinstance(value, str)
    }
    here = {
        name: Path(place)
        for name, place in named.items()
        if os.path.isfile(place) or os.path.isfile(os.path.join(place, "config.json"))
    }
    return {name: files_fingerprint(place) for name, place in here.items()}


def code_fingerprints(cfg: RunConfig) -> dict[str, str]:
    """Digests of the modules of one's own family, medium, objective and terms, by setting and name;
    without what those import. Rewards are among `rewards_fingerprints`."""
    places = [("model.family", cfg.model.family), ("model.medium", cfg.model.medium)]
    if cfg.stage == "cold_start":
        places += [("cold_start.objective", cfg.cold_start.objective)]
    else:
        places += [("tilt.terms", name) for name in cfg.tilt.terms]
    files = {f"{key} {place}": source(place) for key, place in places if place is not None}
    return {name: files_fingerprint(file) for name, file in files.items() if file is not None}


def defaults_by_key() -> dict[str, Any]:
    """The default of every setting that has one, by dotted key, as a manifest holds it."""
    found: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found[name] = {
                key: value.get_default(call_default_factory=True)
                for key, value in section.model_fields.items()
                if not value.is_required()
            }
    return by_key(to_jsonable_python(found))
