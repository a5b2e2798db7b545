"""A disk that is full, for the tests of what a run does then."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from safetensors import SafetensorError

RUST = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
PLAIN = OSError(errno.ENOSPC, "No space left on device")


class Full:
    """The named writers fail from the `at`-th call of any of them on, each with its own error;
    `count` are the calls so far."""

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int, writers: Sequence[tuple[object, str, Exception]]
    ) -> None:
        self.count, self.at = 0, at
        for owner, name, error in writers:
            patch.setattr(owner, name, self.wrap(getattr(owner, name), error))

    def wrap(self, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= self.at:
                raise error
            return function(*args, **kwargs)

        return wrapped
