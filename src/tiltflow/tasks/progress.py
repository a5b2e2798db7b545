"""The command line's callbacks: a bar in a terminal, a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tiltflow.tasks.callbacks import Callbacks

LINE_EVERY = 10.0
"""Seconds between the lines where there is no terminal."""

SHOWN = ("generator/matching", "fake_score/ambient")
"""Metrics beside the bar, of a stage without rewards."""


class Terminal(Callbacks):
    """Bars and lines on a console. The bars are there from the first `begin` to leaving."""

    def __init__(self, console: Console, style: str | None = None) -> None:
        self.console, self.style = console, style
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def begin(self, name: str, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = _bar(self.console)
            self._bar.start()
        started = total is not None
        self._tasks[name] = self._bar.add_task(
            name, start=started, completed=done, total=total, note=""
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        names = [n for n in values if n.startswith("reward/")] or [n for n in SHOWN if n in values]
        note = "  ".join(f"{name.split('/')[-1]} {values[name]:.4g}" for name in names)
        left = None
        for task in self._tasks.values():  # the one stage
            assert self._bar is not None
            self._bar.update(task, completed=step, note=note)
            left = self._bar.tasks[task].time_remaining
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {note}" + (f"  left {left:.0f} s" if left else ""))

    def progress(self, name: str, done: int, total: int) -> None:
        assert self._bar is not None
        task = self._tasks[name]
        self._bar.start_task(task)
        self._bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if self.console.is_terminal or (done < total and now - self._last < LINE_EVERY):
            return
        self._last = now
        left = self._bar.tasks[task].time_remaining if done < total else None
        self.console.print(f"{name}  {done}/{total}" + (f"  left {left:.0f} s" if left else ""))

    def alarm(self, step: int, text: str) -> None:
        said = f"watch: step {step}: {text}"
        self.console.print(said, style="yellow", markup=False, highlight=False)

    def notice(self, text: str) -> None:
        self.console.print(text, style=self.style, markup=False, highlight=False, soft_wrap=True)

    def stopped(self, step: int, text: str) -> None:
        self._end()
        self.console.print(text, soft_wrap=True)


def _bar(console: Console) -> Progress:
    """Description, bar, count, time so far, time left, and the field `note` of a task."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
