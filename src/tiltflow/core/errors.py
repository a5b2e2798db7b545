"""What ends a run and is no mistake in the program; a leaf, so that the command line can name them
without waiting for torch."""

from __future__ import annotations


class PeerLost(RuntimeError):
    """Another rank is gone, so this one cannot go on."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or reward became NaN or infinite."""
