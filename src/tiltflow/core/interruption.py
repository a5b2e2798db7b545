"""Stopping in good order: a signal asks, the loop saves and ends; waits in between give way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SAVE = signal.SIGUSR1
"""What a scheduler's script sends before its limit: it asks as SIGTERM does, but may come again and
again, for a process that was not listening yet; and no launcher counts down to a kill after it."""

REPEAT = 1.0
"""Seconds within which a second signal is the first one's echo: a launcher passes it on as well."""

STOPPING = "tiltflow: the step is finished and saved before the run stops (again: stop at once)"
"""What whoever sends a signal learns at once: a step may take minutes."""

_asked: list[threading.Event] = []
"""The event of the `interruptible` block that is open in this process, if one is."""


class Stopped(Exception):
    """The run was asked to stop during a `pause`."""


@contextmanager
def interruptible(said: str = "") -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM or `SAVE` sets; a later second SIGINT or SIGTERM interrupts at
    once.

    `said` is a line for the standard error stream at the first one.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, SAVE)}

    first = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if number != SAVE and stopped.is_set() and time.monotonic() - first > REPEAT:
            raise KeyboardInterrupt
        if not stopped.is_set():
            first = time.monotonic()
            if said:
                _say(said)
        stopped.set()

    for s in before:
        signal.signal(s, handle)
    _asked.append(stopped)
    try:
        yield stopped
    finally:
        _asked.remove(stopped)
        for s, handler in before.items():
            signal.signal(s, handler)


def _say(line: str) -> None:
    """Straight to the stream: a buffered write may be under way where the signal came."""
    with suppress(OSError, ValueError):  # closed, or nobody's
        stream = sys.stderr.fileno()
        bar = "\r\x1b[K" if os.isatty(stream) else ""  # what is drawn there, and will be again
        os.write(stream, f"{bar}{line}\n".encode())


def pause(seconds: float) -> None:
    """Sleeps; inside an `interruptible` block, no longer than until a signal asks to stop.

    Raises:
        Stopped: if one did.
    """
    if not _asked:
        time.sleep(seconds)
    elif _asked[-1].wait(seconds):
        raise Stopped
