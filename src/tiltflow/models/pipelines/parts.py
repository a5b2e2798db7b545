"""Configurations of a pipeline's networks, and whether two pipelines' transformers go together."""

from __future__ import annotations

import inspect
from typing import Any

from tiltflow.models.family import Family
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.limits import shown
from tiltflow.models.pipelines.weights import check_weights


def part_config(family: Family, pipeline: Pipeline, part: str) -> dict[str, Any]:
    """The configuration of a diffusers network: its config.json over its class's defaults."""
    import diffusers

    kind = getattr(diffusers, family.classes(part)[0])
    parameters = inspect.signature(kind.__init__).parameters.items()
    return {**{name: p.default for name, p in parameters}, **pipeline.config(part)}


def check_twin(family: Family, pipeline: Pipeline, generator: Pipeline) -> None:
    """Whether the generator's transformer works on the teacher's latents and prompts.

    Raises:
        ValueError: if they differ in what `Family.twin` or `twin_index` names, or a weight is
            missing.
    """
    teacher, other = (part_config(family, each, "transformer") for each in (pipeline, generator))
    for key in family.twin:
        if teacher[key] != other[key]:
            raise ValueError(
                f"the transformer in {generator} has {key}={other[key]} but the one "
                f"in {pipeline} has {teacher[key]}: take two {family.title}s of one size"
            )
    for key, default in family.twin_index.items():
        ours, theirs = (each.index.get(key) or default for each in (pipeline, generator))
        if theirs != ours:
            raise ValueError(
                f"{generator} has {key}={shown(theirs)} in its model_index.json but {pipeline} has "
                f"{shown(ours)}: a student is given the teacher's"
            )
    check_weights(generator, ["transformer"])
