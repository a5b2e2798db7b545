"""How far long work is: a bar in a terminal, a line now and then where there is none."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 10.0
"""Seconds between the lines where there is no terminal."""


def progress_bar(console: Console) -> Progress:
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


class SystemsProgress:
    """The progress of an evaluation: one bar a system. Called as `evaluate_systems` asks."""

    def __init__(self, bar: Progress, names: list[str], console: Console) -> None:
        self.bar, self.console = bar, console
        self.tasks = {name: bar.add_task(name, total=None, start=False, note="") for name in names}
        self._last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        task = self.tasks[name]
        self.bar.start_task(task)
        self.bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if self.console.is_terminal or (done < total and now - self._last < LINE_EVERY):
            return
        self._last = now
        left = self.bar.tasks[task].time_remaining if done < total else None
        self.console.print(f"{name}  {done}/{total}" + (f"  left {left:.0f} s" if left else ""))
