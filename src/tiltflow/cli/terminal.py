"""What the commands write to: text as it is, whatever brackets and colons a path has in it."""

from __future__ import annotations

import io
import sys

from rich.console import Console


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that finds no markup (`[b]`) or emoji (`:x:`) in a text, and breaks no line."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, soft_wrap=True)


def write_any_text() -> None:
    """Has the standard streams write a `?` for a letter that their encoding has not: where the
    locale is not UTF-8, a line with an η or an arrow would end a training."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
