"""What one sees of work that takes long, without a terminal: the methods of `Callbacks`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class Callbacks:
    """Called as the work goes on. Each method does nothing: override those that you want.

    Under torchrun rank 0 alone calls them. What one raises ends the work, as any error would.
    """

    def begin(self, name: str, done: int, total: int | None) -> None:
        """Work called `name` (a stage, a system) begins, or goes on after `done` of `total` steps
        or images; None where the total is not known yet."""

    def progress(self, name: str, done: int, total: int) -> None:
        """So many images of a system are made, or scored."""

    def step(self, done: int, total: int) -> None:
        """So many iterations of training are done; on a GPU the last one may still be under way."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """What `metrics.jsonl` gets of training after iteration `step`: means since the last time,
        by name, without what was not updated. Held-out figures are in `Run.metrics`."""

    def samples(self, step: int, path: Path) -> None:
        """A picture of samples was written to `path`."""

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint was saved as the directory `path`."""

    def alarm(self, step: int, text: str) -> None:
        """The watch raised an alarm (docs/watch.md)."""

    def notice(self, text: str) -> None:
        """A sentence for the user."""

    def stopped(self, step: int, text: str) -> None:
        """Training ended before its last iteration, with its checkpoint at `step`; `text` says why
        and how to go on."""


SILENT = Callbacks()
"""Nobody looks."""
