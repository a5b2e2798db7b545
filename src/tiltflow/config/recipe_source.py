"""Where recipes and packaged files come from, and the strict YAML that they are written in."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tiltflow.core.paths import home_for_tilde, misspelt, read_text

RECIPES = Path(str(resources.files("tiltflow"))) / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 3e-5 is a number, `on` and 010 are not what YAML 1.1 makes them.

    A key that stands twice in a mapping is refused.
    """

    # ruamel.yaml, which reads YAML 1.2, still makes numbers of 010 and 1_000 and a date of
    # 2024-01-01, merges at <<, and goes back to YAML 1.1 where a file says so.

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is no text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )


def parse_yaml(text: str, place: str) -> Any:
    """A YAML document's value; `place` names it in errors.

    Raises:
        ValueError: on bad YAML, a duplicate key, or a tag, anchor or alias.
    """
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.TagToken | yaml.AnchorToken | yaml.AliasToken):
                raise yaml.MarkedYAMLError(
                    problem="tags, anchors and aliases are not allowed",
                    problem_mark=token.start_mark,
                )
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{place}{line}: {problem or 'is not valid YAML'}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply") from error
    except ValueError as error:  # Python's own limit for text as an integer
        raise ValueError(f"{place}: a number has too many digits") from error
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half of a surrogate pair, which is no character") from error
    return value


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def list_recipes() -> list[str]:
    """The packaged recipes' names, sorted."""
    return list(_recipes())


def recipe_name(recipe: str) -> str:
    """A packaged recipe's name, or a file's without directory and ending."""
    return Path(recipe).stem if _is_file_name(recipe) else recipe


def recipe_text(recipe: str) -> str:
    """The recipe as written, comments and all.

    Raises:
        ValueError: if there is no such recipe (the nearest is named), or it cannot be read.
    """
    packaged = _recipes()
    path = packaged.get(recipe)
    if path is None and (Path(home_for_tilde(recipe)) / "config.yaml").is_file():
        raise ValueError(f"{recipe} is a run directory: its recipe is {recipe}/config.yaml")
    if path is None and not _is_file_name(recipe):
        hint = f"; the nearest is {nearest(recipe, list(packaged))}" if packaged else ""
        raise ValueError(f"unknown recipe {recipe!r}{hint}")
    path = path or Path(home_for_tilde(recipe))
    if not path.is_file():
        raise ValueError(f"there is no recipe file {recipe}{misspelt(recipe)}")
    return read_text(path, recipe)


def run_directory_of(recipe: str) -> Path | None:
    """The run directory whose own `config.yaml` a recipe is; None for any other recipe."""
    path = Path(recipe).expanduser()
    if recipe in _recipes() or path.name != "config.yaml":
        return None
    begun = (path.parent / "checkpoints").is_dir() or (path.parent / "metrics.jsonl").is_file()
    return path.parent if begun else None


def read_recipe(recipe: str) -> dict[str, Any]:
    """The recipe's top-level mapping.

    Raises:
        ValueError: as `recipe_text` and `parse_yaml`, or if it is no mapping.
    """
    raw = parse_yaml(recipe_text(recipe), recipe)
    if not isinstance(raw, dict):
        raise ValueError(f"{recipe} should hold a mapping of keys to values")
    return raw


def _is_file_name(recipe: str) -> bool:
    return recipe.lower().endswith((".yaml", ".yml"))


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choice most like `word`, by the whole of it and by what follows its last dot."""

    def likeness(choice: str) -> float:
        last = difflib.SequenceMatcher(None, word.split(".")[-1], choice.split(".")[-1]).ratio()
        return difflib.SequenceMatcher(None, word, choice).ratio() + last

    return max(choices, key=likeness)
