"""What the commands write to: text as it is, whatever brackets and colons a path has in it."""

from __future__ import annotations

from rich.console import Console


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that finds no markup (`[b]`) or emoji (`:x:`) in a text, and breaks no line."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, soft_wrap=True)
