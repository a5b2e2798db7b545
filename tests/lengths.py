"""Which of a test's cases `make test` has, where all of them take minutes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_long(names: Iterable[str], *quick: str) -> list[Any]:
    """Names as a test's parameters: `make test` has the `quick` ones, `make test-slow` the rest."""
    names = list(names)
    missing = set(quick) - set(names)
    if missing:
        raise ValueError(f"no such cases: {sorted(missing)}")
    return [n if n in quick else pytest.param(n, marks=pytest.mark.long) for n in names]
