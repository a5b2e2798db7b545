"""The run configuration: a recipe and overrides in, a checked `RunConfig` out (DESIGN §2).

`load_config` touches no file but the recipe; `validate_files` looks at the files that a config
names, before any weight is loaded (`checks.py` has the list that a run goes through).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from pydantic import BaseModel, ValidationError

from tiltflow.config.recipe_source import (
    list_recipes,
    nearest,
    parse_yaml,
    read_recipe,
    recipe_name,
    recipe_text,
    run_directory_of,
)
from tiltflow.config.schema import BucketConfig, RewardConfig, Rewards, RunConfig, plain_weight
from tiltflow.core.latest import steps_in
from tiltflow.core.paths import resolve_path
from tiltflow.core.settings import complaint
from tiltflow.data.columns import weights_of
from tiltflow.data.prompts import PACKAGED, Prompt, load_prompts
from tiltflow.models.pipelines.directory import HUB_ID, Pipelines
from tiltflow.models.pipelines.files import check_directory, check_teacher
from tiltflow.rewards.remote.address import refuse_secrets

__all__ = [
    "Later",
    "PromptSets",
    "RewardConfig",
    "RunConfig",
    "check_few_step",
    "check_model_files",
    "check_reward_files",
    "config_keys",
    "dump_config",
    "list_recipes",
    "load_config",
    "read_prompts",
    "recipe_text",
    "validate_files",
]

_KINDS = {"model.path": "DIR", "data.prompts": "FILE"}
"""What must be given, where that is no plain value."""

_BUCKET = [f"data.buckets.{key}" for key in BucketConfig.model_fields]
_REWARDS = (["rewards"], ["watch", "rewards"])


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A packaged recipe or a `.yaml` file, with overrides `a.b=value` (value in YAML).

    `run.out` is `runs/NAME` unless it is given. The `config.yaml` of a run directory means that
    directory, wherever it was moved or copied to, unless an override names another.

    Raises:
        ValueError: in one sentence: an unknown recipe or key (the nearest is named), bad YAML,
            a value of the wrong kind, values that do not go together, or a password or token,
            which is not repeated.
    """
    raw = read_recipe(recipe)
    refuse_secrets(raw)
    for override in overrides:
        refuse_secrets(override)
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ValueError(f"the override {override!r} should read key=value")
        _refuse_unknown_section(key.strip())
        _set(raw, key.strip(), parse_yaml(text, f"the value of {key.strip()}"))
    raw = _without_empty_sections(raw)
    refuse_secrets(raw)
    run = raw.setdefault("run", {})
    if isinstance(run, dict):
        own = run_directory_of(recipe)
        given = {override.partition("=")[0].strip() for override in overrides}
        if own is not None and not given & {"run", "run.out"}:
            run["out"] = str(own)
        run.setdefault("out", f"runs/{recipe_name(recipe)}")
    try:
        # By way of JSON, where strict validation takes a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ValueError(_sentence(error)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back as an equal one."""
    other = "tilt" if config.stage == "cold_start" else "cold_start"
    values = config.model_dump(mode="json", exclude={other})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def config_keys() -> list[str]:
    """Every dotted key of a config, in order; a reward's have NAME in them."""
    return _keys(RunConfig)


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        if info.annotation == Rewards:
            keys += [f"{prefix}{name}.NAME"]
            keys += [f"{prefix}{name}.NAME.{key}" for key in RewardConfig.model_fields]
        elif _is_section(info.annotation):
            keys += _keys(info.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _without_empty_sections(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sections of which only the name is written (`rewards:`)."""
    watch = raw.get("watch")
    if isinstance(watch, dict) and "rewards" in watch and watch["rewards"] is None:
        raw = {**raw, "watch": {k: v for k, v in watch.items() if k != "rewards"}}
    return {key: value for key, value in raw.items() if value is not None}


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets one key of the nested mapping, making sections on the way."""
    path = _split(dotted)
    at = raw
    for i, part in enumerate(path[:-1]):
        inside = {} if at.get(part) is None else at[part]
        if path[:i] in _REWARDS:
            inside = plain_weight(inside)
        if not isinstance(inside, dict):
            raise ValueError(f"{'.'.join(path[: i + 1])} is {inside!r}, so it has no {path[i + 1]}")
        at[part] = inside
        at = inside
    at[path[-1]] = value


def _split(dotted: str) -> list[str]:
    """The parts of a key. A reward given by dotted path (`package.module:Name`) or by address
    (`remote:http://127.0.0.1:8000/NAME`) stays whole."""
    parts = dotted.split(".")
    for prefix in _REWARDS:
        n = len(prefix)
        if parts[:n] == prefix and ":" in dotted:
            last = max(i for i, part in enumerate(parts) if ":" in part or "/" in part)
            return [*prefix, ".".join(parts[n : last + 1]), *parts[last + 1 :]]
    return parts


def _refuse_unknown_section(dotted: str) -> None:
    """Names the nearest full key for an override `section.key` of no section."""
    section, dot, _ = dotted.partition(".")
    if dot and section not in RunConfig.model_fields:
        raise ValueError(f"unknown key {dotted}; the nearest is {nearest(dotted, config_keys())}")


def _candidates(prefix: str, value: object) -> list[str]:
    section = prefix.removesuffix(".").rpartition(".")[0]
    if section in ("rewards", "watch.rewards") or ":" in prefix:
        return [f"{prefix}{key}" for key in RewardConfig.model_fields]
    if isinstance(value, dict) and not prefix:
        return list(RunConfig.model_fields)
    return config_keys()


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's complaints as one sentence with the dotted key.

    An unknown key comes before all others: what is misspelt is missing, too.
    """
    first, *others = error.errors()
    for unknown in (one for one in (first, *others) if one["type"] == "extra_forbidden"):
        *section, _ = place = [str(part) for part in unknown["loc"]]
        choices = _candidates("".join(f"{part}." for part in section), unknown["input"])
        if place[:2] == ["data", "buckets"]:  # a union of lists, of whose keys none is in the table
            place, choices = ["data", "buckets", place[-1]], _BUCKET
        dotted = ".".join(place)
        return f"unknown key {dotted}; the nearest is {nearest(dotted, choices)}"
    if (
        others
        and first["type"] in ("int_type", "string_type")
        and isinstance(first["input"], list | tuple)
    ):
        first = others[0]  # of what is one number or two
    key = ".".join(str(part) for part in first["loc"] if not _is_tag(part))
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        key = _leaf(first["loc"])
        return f"{key} is not set: add it to the recipe, or give {key}={_KINDS.get(key, 'VALUE')}"
    if first["type"] == "value_error" and not key:
        return str(first["ctx"]["error"])
    return complaint(first, key)


def _leaf(place: Sequence[int | str]) -> str:
    """The key that a place of the config names; of a section, the first that is needed."""
    at: type[BaseModel] = RunConfig
    parts = [str(part) for part in place if not _is_tag(part)]
    for part in parts:
        field = at.model_fields.get(part)
        if field is None or not _is_section(field.annotation):
            return ".".join(parts)
        at = field.annotation
    needed = next(name for name, field in at.model_fields.items() if field.is_required())
    return ".".join([*parts, needed])


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


TAGS = ("str", "constrained-str", "int", "constrained-int")


def _is_tag(part: int | str) -> bool:
    """Whether pydantic put it into a location to say which member of a union it tried."""
    return isinstance(part, int) or "[" in part or part in TAGS


@dataclass(frozen=True)
class PromptSets:
    """The prompts of training, and those of samples and held-out rewards."""

    train: list[Prompt]
    fixed: list[Prompt]


def read_prompts(config: RunConfig) -> PromptSets:
    """The prompt files of a config, each read once.

    Raises:
        ValueError: as `load_prompts` and `weights_of`.
    """
    data = config.data
    train = load_prompts(data.prompts, data.split, data.columns)
    weights_of(data.columns.weight, train)
    if data.eval_prompts in (None, data.prompts) and data.eval_split in (None, data.split):
        return PromptSets(train, train)
    other = data.eval_prompts or data.prompts
    plain = other in PACKAGED or other.lower().endswith(".txt")
    columns = None if plain else data.columns
    return PromptSets(train, load_prompts(other, data.eval_split, columns))


def validate_files(config: RunConfig) -> PromptSets:
    """Checks that what the config names on disk is there and can be read; loads no weight.

    A model path that is neither on disk nor written like a local path is left to the hub. The
    prompts, which are read on the way, are returned.

    Raises:
        ValueError: naming the key, the path and what is missing.
    """
    check_model_files(config)
    check_few_step(config)
    check_reward_files(config)
    return read_prompts(config)


def check_model_files(config: RunConfig, pipelines: Pipelines | None = None) -> None:
    """That the pipelines of the model are there and whole, and model.path a teacher's, or could be
    on the hub.

    `pipelines` are the config's, where something has been read of them already.

    Raises:
        ValueError: naming the key, the path and what is missing.
    """
    model = config.model
    if model.medium is not None:
        from tiltflow.models.medium import (
            load_medium,  # torch, which reading a recipe does not need
        )

        load_medium(model.medium)
    if not model.has_files:
        return
    pipelines = pipelines or model.pipelines
    for key, path, name in (
        ("model.path", model.path, "model"),
        ("model.generator_path", model.generator_path, "generator"),
    ):
        here = pipelines.here(name)
        if path is not None and here is None:
            _require_hub_id(key, path)
        elif here is not None:
            try:
                check_directory(here)
                if name == "model":
                    check_teacher(here)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error


def check_reward_files(config: RunConfig) -> None:
    """That the weights of the rewards are there, or could be on the hub.

    Raises:
        ValueError: naming the key and the path.
    """
    for prefix, rewards in (("rewards", config.rewards), ("watch.rewards", config.watch.rewards)):
        for name, reward in rewards.items():
            if reward.path is not None and not Path(resolve_path(reward.path)).exists():
                _require_hub_id(f"{prefix}.{name}.path", reward.path)


def _require_hub_id(key: str, path: str) -> None:
    """Refuses a path that does not exist and could not be `organisation/name` on the hub."""
    if not HUB_ID.fullmatch(path):
        raise ValueError(f"{key} {path} does not exist, and is no hub id (organisation/name)")


class Later(ValueError):
    """Something is missing that a run before this one makes: no fault of the config's."""


def check_few_step(config: RunConfig) -> None:
    """That what stage 2 starts from is there.

    Raises:
        Later: if there is no such directory.
        ValueError: if it holds neither a run nor a LoRA.
    """
    path = config.model.few_step
    if path is None:
        return
    folder = Path(resolve_path(path))
    if not folder.exists() and config.run.resume and steps_in(Path(config.run.out) / "checkpoints"):
        return  # stage 2's own checkpoints hold what it stands on
    if not folder.is_dir():
        kind = ValueError if folder.exists() else Later
        raise kind(f"model.few_step {path} is no directory: train stage cold_start first")
    kept = folder / "checkpoints"
    if (
        not (kept / "latest").exists()
        and not steps_in(kept)
        and not any(
            any(folder.glob(pattern))
            for pattern in ("*.safetensors", "export/few_step/*.safetensors")
        )
    ):
        raise ValueError(
            f"model.few_step {path} has neither checkpoints/latest nor LoRA weights (*.safetensors)"
        )
