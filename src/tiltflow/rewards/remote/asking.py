"""What a judge is asked, and where: the options of a `judge:MODEL` reward."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import Field

from tiltflow.core.paths import home_for_tilde
from tiltflow.rewards.remote.address import (
    JUDGE,
    REMOTE,
    Address,
    Settings,
    options_of,
    remote_settings,
)

KEY_VARIABLE = "TILTFLOW_JUDGE_KEY"
"""The environment variable of the endpoint's key: it is in no recipe, no run and no log."""
PLACE = "{prompt}"
LONGEST_RUBRIC = 64 * 1024


@pydantic.dataclasses.dataclass(
    frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False)
)
class JudgeSettings:
    """How a judge is asked: the `rubric`'s file, its `form` (a score for each image, or ranks
    within a group, by pairs or of all at once), the `endpoint` (what stands before
    /chat/completions), the scores that it may give, from `low` to `high`, how many images it is
    asked about at a time, where its answers are kept ("off": nowhere; None: the user's cache), and
    how long an answer is at most, in tokens. `dtype` is the precision of a model that runs here.
    The others are as of a remote reward (`Settings`).

    Raises:
        ValueError: if a value makes no sense.
    """

    rubric: Annotated[str, Field(min_length=1)]
    form: Literal["score", "pairs", "group"] = "score"
    endpoint: str = "http://127.0.0.1:8000/v1"
    low: float = 1.0
    high: float = 10.0
    parallel: Annotated[int, Field(ge=1, le=64)] = 8
    cache: str | None = None
    tokens: Annotated[int, Field(ge=8, le=65536)] = 64
    dtype: Literal["bf16", "fp32"] = "bf16"
    timeout: Annotated[float, Field(gt=0, le=86400.0)] = 120.0
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    patience: Annotated[float, Field(ge=0, le=8.64e7)] | None = None

    def client(self) -> Settings:
        """Its part for the client."""
        return Settings(timeout=self.timeout, retries=self.retries, patience=self.patience)


AWAY = ("endpoint", "parallel", "timeout", "retries", "patience")
"""Options of a judge behind an endpoint."""
HERE = ("dtype",)
"""Those of one with a `path`, which runs in this process."""


def judge_settings(name: str, options: Mapping[str, Any], path: str | None = None) -> JudgeSettings:
    """The settings of `judge:MODEL` from its options; with a `path` the model runs here.

    Raises:
        ValueError: if the name has no model, or an option is missing, unknown or makes no sense.
    """
    model = name.removeprefix(JUDGE)
    if not model or not model.isprintable() or len(model) > 200:
        raise ValueError(f"reward {name[:60]!r} names no model: write {JUDGE}MODEL")
    needs = {"rubric": "a file that says what is good"}
    settings = options_of(JudgeSettings, name, options, needs)
    for key in HERE if path is None else AWAY:
        if key in options:
            why = "has no path, so it" if path is None else f"has the path {path!r}, so it"
            place = "runs behind an endpoint" if path is None else "runs here, behind no endpoint"
            raise ValueError(f"reward {name!r} {why} {place}: it takes no option {key}")
    if not settings.low < settings.high:
        raise ValueError(
            f"reward {name!r}: option low is {settings.low:g}, which is not below high "
            f"{settings.high:g}"
        )
    endpoint_of(name, settings.endpoint)
    return settings


def ranks(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a reward of a config ranks images against each other, and so has no scores."""
    return name.startswith(JUDGE) and options.get("form", "score") != "score"


def refuse_ranks(name: str, options: Mapping[str, Any]) -> None:
    """For whoever needs a score of each image.

    Raises:
        ValueError: if the reward has none.
    """
    if ranks(name, options):
        raise ValueError(
            f"reward {name!r} ranks the images of a group against each other (option form "
            f"{options['form']}), so no image has a score of its own: it can be trained on under "
            "rewards in stage tilt, and not be evaluated, watched or held out"
        )


def require_guide(name: str) -> None:
    """Passes a judge that runs here, if what holds its answers to their form is installed.

    Raises:
        ValueError: if it is not.
    """
    try:
        importlib.import_module("llguidance")
    except ImportError as error:
        raise ValueError(
            f"reward {name!r} runs a model that is held to its answers' form, which needs the "
            "package llguidance: pip install 'tiltflow[judge]'"
        ) from error


def endpoint_of(name: str, endpoint: str) -> Address:
    """The address of an endpoint.

    Raises:
        ValueError: if it is none, or has more than host, port and path in it: it is not repeated.
    """
    try:
        return Address.of(REMOTE + endpoint.rstrip("/"))
    except ValueError:
        raise ValueError(
            f"reward {name!r}: option endpoint is to be host, port and path alone, such as "
            f"http://127.0.0.1:8000/v1; a key belongs in {KEY_VARIABLE}"
        ) from None


def read_rubric(name: str, place: str) -> str:
    """The text of a rubric, with {prompt} where the prompt goes.

    Raises:
        ValueError: if it cannot be read, is too long or does not say where the prompt goes.
    """
    try:
        data = Path(home_for_tilde(place)).read_bytes()
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"reward {name!r}: the rubric {place!r} cannot be read") from error
    if len(data) > LONGEST_RUBRIC:
        raise ValueError(f"reward {name!r}: the rubric {place!r} has over {LONGEST_RUBRIC} bytes")
    if PLACE not in text:
        raise ValueError(f"reward {name!r}: the rubric {place!r} must hold {PLACE}")
    return text


def settings_elsewhere(
    name: str, options: Mapping[str, Any], path: str | None = None
) -> Settings | JudgeSettings:
    """The settings of a judge, or of a reward that another process computes.

    Raises:
        ValueError: as `remote_settings` or `judge_settings`, or if it has a path and no weights.
    """
    if name.startswith(JUDGE):
        return judge_settings(name, options, path)
    if path is not None:
        raise ValueError(f"reward {name!r} has no weights to load, so it takes no path")
    return remote_settings(name, options)
