"""Imports of large libraries, without what slows them down."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Holds the garbage collector back: modules stay, but it looks through all of them again each
    time that a quarter has been added, which is a sixth of the time that torch and diffusers take.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
