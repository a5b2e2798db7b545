"""What settings are made of: a frozen section, and the numbers and texts in it.

A section of a run's configuration is the settings of the component that takes it, so it lives with
that component; `config/schema.py` puts the sections together.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tiltflow.core.limits import (
    FAR,
    LONGEST_SIDE,
    MOST_IMAGES,
    MOST_SAMPLES,
    MOST_STEPS,
    MOST_TOKENS,
)
from tiltflow.core.paths import home_for_tilde

Positive = Annotated[int, Field(ge=1, le=FAR)]
Count = Annotated[int, Field(ge=0, le=FAR)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _place(path: str) -> str:
    """A path with the home directory for a leading `~`."""
    if "\0" in path:
        raise ValueError("have no null character in it")
    try:
        return home_for_tilde(path)
    except ValueError as error:
        raise ValueError("not begin with the ~ of a user who has no home directory") from error


Place = Annotated[Text, AfterValidator(_place)]
"""A path, a hub id or something packaged; the home directory stands for a leading `~`."""


class Section(BaseModel):
    """Frozen, and nothing is coerced: 4.0 is no integer, "4" is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
