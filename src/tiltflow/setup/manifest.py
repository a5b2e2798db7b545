"""What a run is made of, kept in each of its checkpoints; `train.changes` compares two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from tiltflow.config.load import PromptSets, RunConfig
from tiltflow.core.paths import resolve_path
from tiltflow.data.prompts import Prompt
from tiltflow.models.families import check_pipeline, local_pipeline
from tiltflow.models.pipelines.fingerprint import (
    adapter_fingerprint,
    encoders_fingerprint,
    pipeline_fingerprint,
)
from tiltflow.models.roles import State
from tiltflow.setup.run_directory import with_absolute_paths


def manifest_of(cfg: RunConfig, sets: PromptSets, few_step: State | None) -> dict[str, Any]:
    """A run's manifest, as JSON holds it. `few_step` are the weights that stage 2 stands on.

    Raises:
        ValueError: if a pipeline is not where the config says.
    """
    model, other = cfg.model, "tilt" if cfg.stage == "cold_start" else "cold_start"
    return {
        "seed": cfg.run.seed,
        "family": _family(model.path, model.family),
        "base": _base(model.path),
        "generator_base": _base(model.generator_path) if model.generator_path else None,
        "few_step": adapter_fingerprint(few_step) if few_step else None,
        "encoders": None if model.path == "mixture" else encoders_fingerprint(_root(model.path)),
        "prompts": _of_prompts(sets.train),
        "eval_prompts": _of_prompts(sets.fixed),
        "config": with_absolute_paths(cfg).model_dump(mode="json", exclude={other}),
    }


def _family(path: str, family: str | None) -> str:
    return "mixture" if path == "mixture" else check_pipeline(_root(path), family)


def _base(path: str) -> str:
    return "mixture" if path == "mixture" else pipeline_fingerprint(_root(path))


def _root(path: str) -> Any:
    return local_pipeline(resolve_path(path))


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    """The number of the prompts, and a digest of their texts and metadata in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [prompt.text, dict(prompt.metadata)]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return f"{len(prompts)} prompts {digest.hexdigest()[:16]}"
