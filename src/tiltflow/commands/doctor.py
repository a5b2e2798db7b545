"""`tiltflow doctor` and `recipes`: looking before training."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

from tiltflow.build import device_of
from tiltflow.config import list_recipes, load_config, recipe_text, validate_files

PACKAGES = ("tiltflow", "torch", "diffusers", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def examine(recipe: str | None, overrides: Sequence[str], console: Console) -> None:
    """Prints versions and device; with a recipe, checks its settings and files.

    Raises:
        ValueError: in one sentence, what is wrong with the recipe.
    """
    for name, value in versions().items():
        console.print(f"{name} {value}")
    console.print(f"device {device_of('auto')}, {torch.get_num_threads()} threads")
    if recipe is not None:
        cfg = load_config(recipe, overrides)
        validate_files(cfg)
        groups = "" if cfg.stage == "cold_start" else f" in groups of {cfg.tilt.group_size}"
        console.print(
            f"{recipe}: {cfg.stage}, {cfg.train.steps} steps of {cfg.train.batch_size} samples"
            f"{groups}, in order"
        )


def show_recipes(name: str | None, console: Console) -> None:
    if name is None:
        for recipe in list_recipes():
            console.print(recipe)
        return
    text = recipe_text(name)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
