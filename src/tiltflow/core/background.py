"""Calls that another thread makes, one after another, while this one goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """A thread of its own for calls, in the order given. A process that ends does not wait for it.

    The executors of the standard library do: a reward server that is away would hold up the end
    of a run that failed.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = (
            queue.SimpleQueue()
        )
        self._closed = threading.Event()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def call(self, function: Callable[..., Any], *args: Any) -> Future:
        """`function(*args)` in its turn; the future has what it returns or raises."""
        future: Future = Future()
        self._calls.put((future, function, args))
        return future

    def close(self) -> None:
        """Ends the thread after the call that it is in; later ones are cancelled."""
        self._closed.set()
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, function, args = item
            if self._closed.is_set():
                future.cancel()
                continue
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
