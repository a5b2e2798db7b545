"""What the commands run in, and write to: text as it is, with any brackets and colons of a path."""

from __future__ import annotations

import io
import sys
from collections.abc import MutableMapping

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


SPINS = "10000"
"""How often a thread of GNU's OpenMP looks for its next work before it sleeps: for tenths of a
millisecond, longer than from one product to the next. Its own 300,000 are some ten milliseconds.
Where other processes want the cores, too, threads then mostly wait for one that has none."""


def threads_give_way(environment: MutableMapping[str, str]) -> None:
    """Sets `SPINS`, before torch loads OpenMP, where the user has not said how threads wait."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def interrupted(arguments: list[str]) -> str:
    """What whoever pressed Ctrl-C is told."""
    return "tiltflow: interrupted" + GOING_ON.get(arguments[0] if arguments else "", "")


def write_any_text() -> None:
    """Has the standard streams write a `?` for a letter that their encoding has not: where the
    locale is not UTF-8, a line with an η or an arrow would end a training."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
