"""docs/settings.md from the schema: each setting's type, range, default and meaning.

python scripts/settings_table.py
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tiltflow.config.meanings import MEANINGS, SECTIONS
from tiltflow.config.schema import RewardConfig, RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Every setting of a recipe, by section. On the command line a setting is `section.key=value`.
A setting without a default must be given. `null` means unset.
[training.md](training.md) explains how they work together. `tiltflow recipes NAME` prints
the values of a recipe.

This page is made from `src/tiltflow/config/schema.py` by `python scripts/settings_table.py`.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def kind(annotation: Any) -> str:
    """A type in a reader's words, its bounds with it."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(inside[0]) + limits(inside[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part) for part in inside if part is not type(None))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        if Ellipsis in inside:
            return f"list of {kind(inside[0])}"
        return f"{len(inside)} of {kind(inside[0])}"
    if origin is dict or annotation is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[annotation]


def limits(metadata: typing.Iterable[Any]) -> str:
    """Bounds as text: " ≥ 0, < 1"."""
    found = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.append(limits(item.metadata).strip(" ,"))
        for name, sign in BOUNDS.items():
            if isinstance(item, getattr(annotated_types, name.capitalize())):
                found.append(f"{sign} {getattr(item, name):,}")
    found = [text for text in found if text]
    return " " + ", ".join(found) if found else ""


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "–"
    value = field.default
    if field.default_factory is not None or value is PydanticUndefined:
        return "empty"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def row(key: str, field: FieldInfo) -> str:
    """A setting's row; a setting without a meaning is a KeyError that names it."""
    values = kind(field.annotation) + limits(field.metadata)
    return f"| `{key}` | {values} | {default(field)} | {MEANINGS[key]} |"


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    inner = field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """The fields by their full name; those of a section inside follow in its place."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = section_of(field)
        found |= settings(inner, f"{prefix}{name}.") if inner else {prefix + name: field}
    return found


def every_setting() -> dict[str, FieldInfo]:
    return settings(RunConfig) | settings(RewardConfig, "rewards.NAME.")


def table(title: str, about: str, fields: dict[str, FieldInfo]) -> str:
    head = "| setting | values | default | what it means |\n|---|---|---|---|\n"
    lines = "".join(f"{row(key, field)}\n" for key, field in fields.items())
    return f"\n## {title}\n\n{about}\n\n{head}{lines}"


def page() -> str:
    """The whole page."""
    fields = every_setting()
    parts = [
        HEAD,
        table("Stage", "Which of the two stages a recipe is.", {"stage": fields["stage"]}),
    ]
    for name, about in SECTIONS.items():
        inside = {key: f for key, f in fields.items() if key.startswith(f"{name}.")}
        parts.append(table(f"`{name}`", about, inside))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
