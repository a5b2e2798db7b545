"""Suites: a prompt format bound to the rewards that score it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """`prompts` is a packaged set, or None where the user brings the file; reward names."""

    prompts: str | None
    rewards: tuple[str, ...]


SUITES = {"shapes": Suite("shapes-heldout", ("shapes", "clipscore", "clipscore_heldout"))}


def suite_of(name: str) -> Suite:
    """The suite of this name.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name in SUITES:
        return SUITES[name]
    near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)
    raise ValueError(f"there is no suite {name!r}; the nearest is {near[0]}")
