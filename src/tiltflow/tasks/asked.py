"""The keywords of `sample` and `evaluate`, held to their kinds before anything else is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from tiltflow.config.schema import as_tuple
from tiltflow.core.limits import LARGEST_SEED
from tiltflow.core.settings import Place, Samples, Section, Size, Steps, Text, Tokens, complaint
from tiltflow.core.sizes import same_as
from tiltflow.data.buckets import MOST_SIZES


def _path(value: object) -> object:
    """A path as its text; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Where = Annotated[Place, BeforeValidator(_path)]


class Asked(Section):
    """What `Sampling` says of each. Numbers that are not finite are refused where they are used."""

    model_config = ConfigDict(allow_inf_nan=True)

    few_step: Where | None = None
    tilt_lora: Where | None = None
    tilt: float = 1.0
    steps: Steps | None = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    guidance: float | None = None
    student_guidance: float | None = None
    teacher_steps: Steps = 50
    batch: Samples = 64
    device: Text = "auto"
    resolution: Size | None = None
    sizes: Annotated[tuple[Size, ...], BeforeValidator(as_tuple), Field(max_length=MOST_SIZES)] = ()
    max_sequence_length: Tokens | None = None
    generator_path: Where | None = None
    family: Text | None = None
    cache: Where | None = None


def asked(how: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, checked; those that `Asked` does not have are handed on.

    Raises:
        ValueError: in one sentence, the first value that is of a wrong kind or out of range.
    """
    known = {name: value for name, value in how.items() if name in Asked.model_fields}
    try:
        found = Asked.model_validate(known)
    except ValidationError as error:
        first, *others = error.errors()
        if others and isinstance(first["input"], tuple | list) and first["type"] == "int_type":
            first = others[0]  # of what is one number or two
        raise ValueError(complaint(first, str(first["loc"][0]))) from error
    given = dict(how) | {name: getattr(found, name) for name in known}
    if given.get("resolution") is not None:
        given["resolution"] = same_as(given["resolution"])
    if "sizes" in given:
        given["sizes"] = tuple(same_as(size) for size in given["sizes"])
    return given
