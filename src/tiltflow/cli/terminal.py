"""What the commands write to: text as it is, whatever brackets and colons a path has in it."""

from __future__ import annotations

import io
import sys

from rich.console import Console

INTERRUPTED = 130
"""The status after Ctrl-C, where no command saw to it itself."""

GOING_ON = {
    **dict.fromkeys(
        ("demo", "evaluate", "dial", "study", "encode"), "; the same command goes on from here"
    ),
    "train": "; run.resume=auto goes on from the last checkpoint, if there is one",
}
"""What is there after Ctrl-C, by command, of those that take long."""


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that finds no markup (`[b]`) or emoji (`:x:`) in a text, and breaks no line."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, soft_wrap=True)


def interrupted(arguments: list[str]) -> str:
    """What whoever pressed Ctrl-C is told."""
    return "tiltflow: interrupted" + GOING_ON.get(arguments[0] if arguments else "", "")


def write_any_text() -> None:
    """Has the standard streams write a `?` for a letter that their encoding has not: where the
    locale is not UTF-8, a line with an η or an arrow would end a training."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
