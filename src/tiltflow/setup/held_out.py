"""Whether what a run holds out is another reward than those it trains on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig
from tiltflow.config.schema import RewardConfig
from tiltflow.core.paths import resolve_path
from tiltflow.models.pipelines.fingerprint import files_fingerprint
from tiltflow.rewards.base import BUILTIN, PUBLISHED, published_reward, target_of
from tiltflow.rewards.fitted import fitted_folder, is_fitted
from tiltflow.rewards.packaged import CLIP_WEIGHTS, PICKSCORE
from tiltflow.rewards.remote.address import JUDGE, REMOTE
from tiltflow.rewards.remote.asking import AWAY, judge_settings

NOT_OF_THE_SCORE = ("at_once", "device", "differentiable", "domain", "elsewhere")
"""What a reward is made with that changes no score of an image."""
CLIPS = CLIP_WEIGHTS | {"pickscore": PICKSCORE}
"""The builtin rewards that are a CLIP's cosine, times a number, and their own weights."""


def check_held_out(cfg: RunConfig) -> None:
    """That no reward under `watch.rewards` is trained on: it would rise with what games it, and
    the rules of the watch take it for a witness.

    Another weight in the sum, or another number of images at once, is not another reward.

    Raises:
        ValueError: naming the first that is, and as which reward.
    """
    for held, one in cfg.watch.rewards.items():
        for trained, other in cfg.rewards.items():
            if same_scores(held, one, trained, other):
                raise ValueError(
                    f"watch.rewards.{held} is trained on, as rewards.{trained}, so it is not held "
                    "out: take it out of watch.rewards, or hold out another reward (docs/watch.md)"
                )


def same_scores(name: str, of: RewardConfig, other_name: str, other: RewardConfig) -> bool:
    """Whether two rewards give an image the same score up to a factor, as far as their settings and
    the files on this machine tell."""
    if _kind(name, of) != _kind(other_name, other):
        return False
    first, second = _decides(name, of), _decides(other_name, other)
    return first == second or _at_their_places(first) == _at_their_places(second)


def deciding_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a reward that decide its scores, with what the files hold that they name."""
    if name.startswith(REMOTE):  # they are of the client, the name says which reward it is
        return {}
    beside = (*AWAY, "cache") if name.startswith(JUDGE) else NOT_OF_THE_SCORE
    return {key: _content(value) for key, value in options.items() if key not in beside}


def _kind(name: str, of: RewardConfig) -> object:
    """What computes the score, whatever it is called in the recipe."""
    if name in CLIPS:
        return "clip"
    if name.startswith("shapes") and name in BUILTIN:
        return "shapes"
    if is_fitted(name):
        return "fitted"
    if name.startswith(JUDGE) and of.path is not None:
        return JUDGE
    return name if name in BUILTIN or name.startswith((JUDGE, REMOTE)) else target_of(name)


def _decides(name: str, of: RewardConfig) -> dict[str, Any]:
    """What a reward's score depends on beside its kind: options with their defaults, and files."""
    path = of.path
    if name.startswith(REMOTE):
        return {}
    if name.startswith(JUDGE):
        settings = asdict(judge_settings(name, of.options, path))
        return deciding_options(name, settings) | {"path": path}
    if name in CLIPS:
        return {"path": path or CLIPS[name]}
    if is_fitted(name):
        return {"folder": str(fitted_folder(name))}
    if name.startswith("shapes") and name in BUILTIN:
        return {"soft": name == "shapes_soft" or bool(of.options.get("soft", False))}
    if name in PUBLISHED:
        found = _defaults(published_reward(name))
    else:
        target = None if name in BUILTIN else target_of(name)
        found = _defaults(target) if isinstance(target, type) else {}
    place = {"path": path or found.get("path")}
    return deciding_options(name, found | of.options) | place


def _defaults(made: type) -> dict[str, Any]:
    takes = inspect.signature(made).parameters
    return {k: p.default for k, p in takes.items() if p.default is not inspect.Parameter.empty}


def _at_their_places(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same with what files and folders of weights hold, in the place of where they are."""
    return {key: _content(value) for key, value in facts.items()}


def _content(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    place = Path(resolve_path(value))
    whole = place.is_file() or any((place / f).is_file() for f in ("config.json", "reward.json"))
    return files_fingerprint(place) if whole else value
