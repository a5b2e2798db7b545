"""`tiltflow recipes`: what there is, each in a line."""

from __future__ import annotations

import re

from rich.console import Console

from tiltflow.config.recipe_source import list_recipes, recipe_text


def show_recipes(name: str | None, console: Console) -> None:
    """The recipes' names, each with the first sentence of what it says about itself, or one of them
    in full.

    Raises:
        ValueError: if there is no such recipe.
    """
    if name is not None:
        console.print(recipe_text(name), highlight=False)
        return
    lines = summaries()
    width = max(map(len, lines))
    for recipe, line in lines.items():
        console.print(f"{recipe:{width}}  {line}", highlight=False)


def summaries() -> dict[str, str]:
    """The packaged recipes' names, each with its `summary`."""
    return {name: summary(recipe_text(name)) for name in list_recipes()}


def summary(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return re.split(r"(?<=[.:;])\s", " ".join(lines), maxsplit=1)[0].rstrip(".:;")
