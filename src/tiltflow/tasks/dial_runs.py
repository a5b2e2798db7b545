"""Several runs in one dial: that they are sampled alike, and what they are scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiltflow.config.load import RunConfig, read_prompts
from tiltflow.config.schema import RewardConfig
from tiltflow.core.paths import resolve_path
from tiltflow.core.sizes import said
from tiltflow.data.prompts import Prompt
from tiltflow.setup.watch_prompts import spread_out
from tiltflow.tasks.request import Request

SCORED = 16
"""Held-out prompts of a run, in its fixed noise, that strengths are scored on: from all over the
file, which may be sorted by what it asks for."""

Table = Mapping[str, RewardConfig]


@dataclass(frozen=True)
class Exam:
    """Held-out prompts in the noise of a seed, and the rewards that are scored on them: those that
    some run trained on, and the others."""

    prompts: list[Prompt]
    seed: int
    trained: dict[str, RewardConfig] = field(default_factory=dict)
    held_out: dict[str, RewardConfig] = field(default_factory=dict)


def check_alike(names: Sequence[str], requests: Sequence[Request]) -> None:
    """That one picture is of all these runs: each is asked to be sampled as the first is.

    Raises:
        ValueError: naming the first that is not, and in what.
    """
    first = _sampling(requests[0])
    for name, request in zip(names[1:], requests[1:], strict=True):
        other = _sampling(request)
        apart = [
            f"{what} {value} and {other[what]}"
            for what, value in first.items()
            if value != other[what]
        ]
        if apart:
            raise ValueError(
                f"{names[0]} and {name} are sampled differently ({'; '.join(apart)}): dial them "
                "one by one"
            )


def _sampling(request: Request) -> dict[str, Any]:
    """All that a student's picture depends on beside its adapters, prompt and seed."""
    chosen, base = request.settled, request.generator_path
    size = chosen.resolution
    return {
        "model": resolve_path(request.model),
        "generator": None if base is None else resolve_path(base),
        "family": request.family,
        "autocast": request.autocast,
        "steps": chosen.steps,
        "η": chosen.eta,
        "guidance": chosen.guidance,
        "size": None if size is None else said(size),
        "text tokens": chosen.max_sequence_length,
        "dtype": chosen.dtype,
        "autoencoder's dtype": chosen.vae_dtype or chosen.dtype,
        "noise levels": dict(chosen.levels),
    }


def plan_exams(names: Sequence[str], cfgs: Sequence[RunConfig]) -> list[Exam]:
    """Every reward of all runs once, on the held-out prompts of the first run that has it; the
    first run's come first, with or without rewards.

    A reward that one run trained on and another holds out is trained. One that has the name of a
    trained one and is another, by its path or options, is held out beside it.

    Raises:
        ValueError: if two runs trained on different rewards of one name, or hold such out.
    """
    trained = _union(names, [cfg.rewards for cfg in cfgs])
    held_out = {
        name: reward
        for name, reward in _union(names, [cfg.watch.rewards for cfg in cfgs]).items()
        if name not in trained or _which(reward) != _which(trained[name])
    }
    found: list[Exam] = []
    for cfg in cfgs:
        own = Exam(spread_out(read_prompts(cfg).fixed)[:SCORED], cfg.run.seed)
        exam = next((e for e in found if (e.prompts, e.seed) == (own.prompts, own.seed)), own)
        if exam is own:
            found.append(own)
        # what is left of the two tables has had no place with an earlier run
        exam.trained.update({n: trained.pop(n) for n in cfg.rewards if n in trained})
        exam.held_out.update({n: held_out.pop(n) for n in cfg.watch.rewards if n in held_out})
    return found[:1] + [exam for exam in found[1:] if exam.trained or exam.held_out]


def _union(names: Sequence[str], tables: Sequence[Table]) -> dict[str, RewardConfig]:
    """Each reward of several runs' tables once.

    Raises:
        ValueError: if two of one name are not the same.
    """
    found: dict[str, RewardConfig] = {}
    first: dict[str, str] = {}
    for run, table in zip(names, tables, strict=True):
        for name, reward in table.items():
            if _which(found.setdefault(name, reward)) != _which(reward):
                raise ValueError(
                    f"{first[name]} and {run} have the reward {name!r} with different paths or "
                    "options: dial them one by one"
                )
            first.setdefault(name, run)
    return found


def _which(reward: RewardConfig) -> tuple[Any, ...]:
    """What a reward's score depends on beside its name. Its weight in a run is no part of it."""
    return reward.path, reward.options
