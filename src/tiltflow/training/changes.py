"""What has changed between a checkpoint and the run that goes on from it, by their manifests.

Another seed, family, base, few-step adapter, number of sampler steps or shape of the adapters
would make another run of it: refused. What may change (rates, prompts, lengths, rewards) is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tiltflow.core.metrics import ANEW

OF_THE_RUN = {
    "seed": "run.seed",
    "family": "model.family",
    "base": "model.path (by its weights)",
    "generator_base": "model.generator_path (by its weights)",
    "few_step": "model.few_step (by its weights)",
    "encoders": "text encoders of model.path (by their weights)",
}
"""What a run keeps, and what it is called in a sentence."""
WITHIN = {
    "side": "{} of the model's tiltflow.json",
    "flags": "{} in model_index.json",
    "rewards": "the files of reward {}",
    "revisions": "how reward {} scores, by its revision",
    "code": "the code of {}",
}
"""Of what a manifest has several by name, and what one is called in a sentence."""
NOT_ALWAYS = ("encoders", "few_step")
"""Not kept by earlier versions, or where nothing needs it: encoders beside cached embeddings, what
full copies started from without a KL."""
PROMPTS = {"prompts": "data.prompts", "eval_prompts": "data.eval_prompts"}
NOT_COMPARED = {
    "model.path", "model.generator_path", "model.few_step", "model.family", "data.prompts",
    "data.eval_prompts", "data.cache", "run.out", "run.resume", "run.resume_from", "run.seed",
    "run.replan",
}  # fmt: skip
"""Settings that are compared by content, or say where and not what."""
HELD_OUT = "held_out"
"""What a checkpoint of stage 1 calls the digests of its held-out rewards, by their names in the log
(`setup.watch_facts`). Stage 2's are in the watch's own memory, and earlier versions kept none."""
LONGEST = 60
"""Characters of a value in a sentence."""


def changes(
    state: Mapping[str, Any], facts: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, str] | None:
    """What has changed between a checkpoint's state and this run's facts: "old → new" by key.

    `defaults` are of the settings that the checkpoint's version may not have had, by dotted key.
    None where the checkpoint is of a version that kept no manifest, so that there is nothing to
    compare with.

    Raises:
        ValueError: if it is another run: which fact is another.
    """
    for key, name in (("stage", "stage"), ("steps", "sampler.steps")):
        _same(name, state.get(key, facts.get(key)), facts.get(key))
    before, here = state.get("manifest"), facts.get("manifest")
    if here is None or before is None:
        return None
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise ValueError("its manifest is no JSON object with a config")
    for key, name in OF_THE_RUN.items():
        if key in NOT_ALWAYS and None in (before.get(key), here[key]):
            continue
        _same(name, before.get(key), here[key])
    new = by_key(here["config"])
    old = filled(by_key(before["config"]), new, defaults)
    found = {
        name: f"{_short(old.get(name))} → {_short(new.get(name))}"
        for name in dict.fromkeys([*new, *old])
        if name not in NOT_COMPARED and old.get(name) != new.get(name)
    }
    for key, name in PROMPTS.items():
        if before.get(key) != here[key]:
            found[name] = f"{_short(before.get(key))} → {_short(here[key])}"
    for key, called in WITHIN.items():
        had, has = before.get(key), here.get(key)
        if not isinstance(had, Mapping) or not isinstance(has, Mapping):
            continue  # not kept by earlier versions
        # a reward that is new or gone is told by its settings
        names = {*had, *has} if key in ("side", "flags") else {*had} & {*has}
        for name in sorted(name for name in names if had.get(name) != has.get(name)):
            found[called.format(name)] = f"{_short(had.get(name))} → {_short(has.get(name))}"
    return found


def bearing(found: Mapping[str, str], facts: Mapping[str, Any], done: int) -> dict[str, str]:
    """The changes with which the iterations so far would have been others: not how often to save,
    nor the length of a schedule that has been constant or warming up for all the `done` ones.

    Without any, a run in parts is one in a single piece, and so is its log.
    """
    train = facts["manifest"]["config"]["train"]
    same_rates = train["schedule"] == "constant" or done <= train["warmup"]
    outside = ("checkpoint.", "log.", "run.rank_timeout", *(("train.steps",) if same_rates else ()))
    return {name: text for name, text in found.items() if not name.startswith(outside)}


def for_the_log(
    found: Mapping[str, str] | None, state: Mapping[str, Any], facts: Mapping[str, Any], done: int
) -> dict[str, str]:
    """What the log is told where a run goes on: what has changed, and which held-out rewards are
    measured otherwise than before (`HELD_OUT`), so that no curve joins the two."""
    text = in_words(bearing(found, facts, done)) if found else ""
    before, here = (of.get(HELD_OUT) for of in (state, facts))
    anew: list[str] = []
    if isinstance(before, Mapping) and isinstance(here, Mapping):
        anew = [name for name, digest in here.items() if before.get(name, digest) != digest]
    return ({"changed": text} if text else {}) | ({ANEW: ", ".join(anew)} if anew else {})


def in_words(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in found.items())


def _same(name: str, before: object, here: object) -> None:
    if json.dumps(before) != json.dumps(here):
        raise ValueError(f"its {name} is {_short(before)}, but here it is {_short(here)}")


def filled(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings `before`, by dotted key, with those that only this version has: a version without a
    setting did what its default does, or had another way, which is then told."""
    return {key: defaults[key] for key in now if key in defaults} | dict(before)


def by_key(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= by_key(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
