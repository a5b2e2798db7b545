"""What the files hold that a cell's run is trained from, and that its settings only name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig, read_prompts
from tiltflow.config.schema import RewardConfig
from tiltflow.core.paths import resolve_path
from tiltflow.evaluation.chunks import place_of
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.rewards.files import files_beside, files_of, revisions
from tiltflow.setup.manifest import (
    code_fingerprints,
    configured_fingerprints,
    model_fingerprints,
    prompts_fingerprint,
)
from tiltflow.setup.starts import load_start

Place = str | Path | None

_TAKEN: dict[str, dict[str, Any]] = {}
"""Digests by what they are of and by the sizes and times of the files: a study has many cells of
one model and one set of prompts."""


def trained_content(cfg: RunConfig, start: Path | None = None) -> dict[str, Any]:
    """Digests as a run's manifest has them: of its prompts, base, rewards and own code, and of the
    stage-1 result `start`; and the revisions of its builtin rewards. What is not on this machine is
    left out: a table is made of results without it, and a run would say so."""
    rewards = {"rewards": cfg.rewards, "watch": cfg.watch.rewards}
    found = _prompts(cfg) | _model(cfg)
    for kind, table in rewards.items():
        found[kind] = _kept(
            [kind, {name: of.model_dump(mode="json") for name, of in table.items()}],
            [place for name, of in table.items() for place in _places(name, of)],
            partial(configured_fingerprints, table),
        )
    found["code"] = code_fingerprints(cfg)
    found["revisions"] = revisions([*cfg.rewards, *cfg.watch.rewards])
    if start is not None:
        found |= _kept(
            ["few_step", str(start)],
            [start],
            lambda: {"few_step": adapter_fingerprint(load_start(start).few_step)},
        )
    return {key: value for key, value in found.items() if value not in (None, {})}


def _prompts(cfg: RunConfig) -> dict[str, Any]:
    data = cfg.data

    def take() -> dict[str, Any]:
        sets = read_prompts(cfg)
        both = {"prompts": sets.train, "eval_prompts": sets.fixed}
        return {name: prompts_fingerprint(prompts) for name, prompts in both.items()}

    given = ["prompts", data.model_dump(mode="json")]
    return _kept(given, [data.prompts, data.eval_prompts], take)


def _model(cfg: RunConfig) -> dict[str, Any]:
    model = cfg.model
    if not model.has_files or not Path(resolve_path(model.path)).exists():
        return {}

    def take() -> dict[str, Any]:
        found = model_fingerprints(model, model.pipelines)
        return {key: value for key, value in found.items() if key != "family"}  # a setting says it

    given = ["model", model.path, model.generator_path, model.family]
    return _kept(given, [model.path, model.generator_path], take)


def _places(name: str, of: RewardConfig) -> Iterator[Place]:
    yield files_of(name, of.path)
    yield from files_beside(name, of.path).values()
    yield from (value for value in of.options.values() if isinstance(value, str))


def _kept(
    given: object, places: list[Place], take: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What `take` gives, taken once for these files; nothing where they cannot be read."""
    marks = [place_of(resolve_path(str(place))) for place in places if place is not None]
    key = json.dumps([given, marks], default=str)
    if key not in _TAKEN:
        try:
            _TAKEN[key] = dict(take())
        except (ValueError, OSError):
            return {}
    return _TAKEN[key]
