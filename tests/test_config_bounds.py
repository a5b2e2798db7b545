"""Every count of a config ends somewhere, and its message says where."""

from __future__ import annotations

import itertools
import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from tiltflow.config.load import RunConfig, config_keys, load_config


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


def unions(part: Any) -> list[Any]:
    """The members of a union that has a validator of its own; else the part itself."""
    inside = get_args(part)[0] if get_origin(part) is Annotated else None
    return list(get_args(inside)) if get_origin(inside) in (Union, UnionType) else [part]


def counts(model: type[BaseModel], prefix: str = "") -> dict[str, int | None]:
    """Every whole number of a config, with its upper bound; of lists, the most members."""
    found: dict[str, int | None] = {}
    for name, info in model.model_fields.items():
        inside, *more = [info.annotation, *get_args(info.annotation)]
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            found |= counts(inside, f"{prefix}{name}.")
            continue
        more = [one for part in more for one in unions(part)]
        annotated = [part for part in more if get_args(part) and get_args(part)[0] is int]
        if inside is int or annotated:
            limits = [*info.metadata, *(m for part in annotated for m in get_args(part)[1:])]
            limits = [inner for m in limits for inner in getattr(m, "metadata", [m])]
            found[prefix + name] = next((m.le for m in limits if hasattr(m, "le")), None)
    return found


COUNTS = counts(RunConfig)


def test_every_count_is_found() -> None:
    assert {"train.batch_size", "model.resolution", "run.seed", "tilt.decode_chunk"} <= set(COUNTS)
    assert len(COUNTS) >= 25


@pytest.mark.parametrize("key", COUNTS)
def test_every_count_has_an_upper_bound_that_its_message_names(key: str) -> None:
    """One beyond the bound, and 2^64, which torch takes for no seed and no size."""
    bound = COUNTS[key]
    assert bound is not None
    recipe = "mixture_cold_start" if key.startswith("cold_start.") else "mixture_tilt"
    for value in (bound + 1, 2**64):
        said = refusal(recipe, f"{key}={value}")
        assert said.startswith(f"{key} is {value}, but it should ")
        assert said.endswith(f"less than or equal to {bound}")


def test_numbers_of_any_length_are_refused_in_a_short_sentence() -> None:
    for digits in (3_000, 5_000):
        said = refusal("mixture_tilt", "train.steps=" + "9" * digits)
        assert "train.steps" in said and len(said) < 300


WRONG = ("[]", "[[]]", "{}", "{a: 1}", "true", "null", '"\\0"', '"\\ud800"', "x y")


@pytest.mark.long
def test_no_value_is_answered_in_pydantics_own_words() -> None:
    said = set()
    for key, wrong in itertools.product(config_keys(), WRONG):
        try:
            load_config("mixture_cold_start", [f"{key.replace('NAME', 'linear')}={wrong}"])
        except ValueError as error:
            said.add(str(error))
    own = r"Value error|Assertion|after validation|valid (array|dictionary|list|tuple)|pattern|JSON"
    assert len(said) > 500
    assert [sentence for sentence in said if re.search(own, sentence) or "\n" in sentence] == []
