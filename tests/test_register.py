"""`tiltflow.register`: names for one's own rewards, terms, objectives, media and families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from test_interface import ROOT, mixture

import tiltflow
from tiltflow.core import registry
from tiltflow.models.families import MIXTURE
from tiltflow.models.family import family_named, family_names
from tiltflow.models.medium import PointMedium, load_medium


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered, and nothing stays."""
    monkeypatch.setattr(registry, "_REGISTERED", {})


def always_one(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
) -> torch.Tensor:
    return torch.ones(len(images))


always_one.domain = "points"  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", [always_one, f"{__name__}:always_one"])
def test_a_registered_reward_is_a_reward_by_name(
    target: object, fresh: None, tmp_path: Path
) -> None:
    tiltflow.register("reward", "one", target)
    tiltflow.register("reward", "one", target)  # a cell that is run twice
    cold = tiltflow.train(mixture(tmp_path / "cold"))
    tilt = tiltflow.load_recipe(
        "mixture_tilt", model={"few_step": cold.path}, rewards={"one": 1.0},
        train={"steps": 1, "batch_size": 4}, tilt={"group_size": 2}, log={"every": 1},
        run={"out": tmp_path / "tilt", "device": "cpu"},
    )  # fmt: skip
    assert tiltflow.train(tilt).metrics[-1]["reward/one"] == 1
    with pytest.raises(ValueError, match="one' is registered already, as"):
        tiltflow.register("reward", "one", "elsewhere:one")


def test_media_and_families_are_registered_too(fresh: None) -> None:
    tiltflow.register("medium", "dots", "tiltflow.models.medium:PointMedium")
    assert isinstance(load_medium("dots"), PointMedium)
    tiltflow.register("family", "again", "tiltflow.models.families:MIXTURE")
    assert family_named("again") is MIXTURE and "again" in family_names()


def test_terms_and_objectives_are_registered_too(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    tiltflow.register("objective", "difference", "own_objective:Difference")
    tiltflow.register("term", "stay", "own_term:Stay")
    config = mixture(tmp_path / "cold").model_dump(mode="json", exclude={"tilt"})
    cold = tiltflow.train(
        tiltflow.load_recipe(
            "mixture_cold_start",
            "cold_start.objective=difference",
            train=config["train"],
            run=config["run"],
        )
    )
    terms = {"stay": {"weight": 1.0}}
    tilt = tiltflow.load_recipe(
        "mixture_tilt", model={"few_step": cold.path}, tilt={"group_size": 2, "terms": terms},
        train={"steps": 1, "batch_size": 4}, log={"every": 1},
        run={"out": tmp_path / "tilt", "device": "cpu"},
    )  # fmt: skip
    assert "generator/stay" in tiltflow.train(tilt).metrics[-1]


@pytest.mark.parametrize(
    ("kind", "name", "target", "said"),
    [
        ("rewrad", "a", "m:f", "no kind 'rewrad' to register: it is one of family, medium, obj"),
        ("reward", "clipscore", "m:f", "'clipscore' is a builtin one"),
        ("reward", "a:b", "m:f", "'a:b' is no name for a reward"),
        ("reward", "a", "m", "'m' should read 'package.module:name'"),
        ("reward", "a", lambda *given: None, "has no place of its own in a module"),
        ("family", "a", MIXTURE, "has no place of its own in a module"),
    ],
)
def test_what_cannot_be_registered(
    kind: str, name: str, target: object, said: str, fresh: None
) -> None:
    with pytest.raises(ValueError, match=said):
        tiltflow.register(kind, name, target)
