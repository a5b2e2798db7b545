"""What settings are made of: a frozen section, and the numbers and texts in it.

A section of a run's configuration is the settings of the component that takes it, so it lives with
that component; `config/schema.py` puts the sections together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tiltflow.core.limits import (
    FAR,
    LONGEST_SIDE,
    MOST_IMAGES,
    MOST_SAMPLES,
    MOST_STEPS,
    MOST_TOKENS,
)
from tiltflow.core.paths import home_for_tilde

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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


def _one_to_three(value: object) -> object:
    """Two or three in a row as a tuple, anything else as it is; what is in it is seen later."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) not in (2, 3):
        raise ValueError("be a side, [height, width] or [frames, height, width]")
    return tuple(value)


Size = Annotated[Side | tuple[Side, Side] | tuple[Side, Side, Side], BeforeValidator(_one_to_three)]
"""As `core.sizes.Resolution`."""


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


def plain(message: str) -> str:
    """One of pydantic's messages without its own words: how it went about it, and JSON's names."""
    message = re.sub(r"^(Value error|Assertion failed), | after validation, not \d+$", "", message)
    message = re.sub(r"\ba valid (array|list|tuple)$", "a list", message)
    return re.sub(
        r"\ban? (object|valid dictionary)( or instance of \w+)?$",
        "a mapping of keys to values",
        message,
    )


def misfit(error: ValidationError) -> str:
    """The first thing that does not fit a form, with its place: what is said of a file."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {plain(first['msg'])}"


def complaint(found: ErrorDetails, key: str) -> str:
    """One of pydantic's complaints about the value of `key`, as a sentence."""
    message = re.sub(r"^(Input|String|List|Tuple|Dictionary) should ", "", plain(found["msg"]))
    if found["type"] == "missing":
        message = "hold more values"
    if found["type"] in ("model_type", "model_attributes_type"):
        number = "a number or " if "rewards." in key else ""
        message = f"be {number}a mapping of keys to values"
    shown = repr(found["input"])
    if len(shown) > 120:
        shown = f"{shown[:100]}…"
    return f"{key} is {shown}, but it should {message}"


Model = TypeVar("Model", bound=BaseModel)


def settled(kind: type[Model], options: Mapping[str, object]) -> Model:
    """The settings of a component from outside, by its own model.

    Raises:
        ValueError: in one sentence, the first thing that is wrong.
    """
    try:
        # By way of JSON, where strict validation takes a list for a tuple.
        return kind.model_validate_json(json.dumps(options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error" and not key:
            raise ValueError(str(first["ctx"]["error"])) from error
        if first["type"] == "missing":
            raise ValueError(f"{key} is not set") from error
        if first["type"] == "extra_forbidden":
            raise ValueError(f"it has no setting {key}") from error
        raise ValueError(complaint(first, key)) from error
