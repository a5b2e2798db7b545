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
    names = list_recipes()
    width = max(map(len, names))
    for recipe in names:
        console.print(f"{recipe:{width}}  {summary(recipe_text(recipe))}", highlight=False)


def summary(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return re.split(r"(?<=[.:;])\s", " ".join(lines), maxsplit=1)[0].rstrip(".:;")
