"""The command line's callbacks: a bar in a terminal, a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from tiltflow.tasks.callbacks import Callbacks

LINE_EVERY = 10.0
"""Seconds between the lines where there is no terminal."""

SPEED_OVER = 3600.0
"""Seconds that the time left is reckoned from: an iteration of a large model takes longer than the
half minute that rich looks back, and would never be given one."""

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

    def step(self, done: int, total: int) -> None:
        for task in self._tasks.values():  # the one stage
            assert self._bar is not None
            self._bar.update(task, completed=done)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        names = [n for n in values if n.startswith("reward/")] or [n for n in SHOWN if n in values]
        note = "  ".join(f"{name.split('/')[-1]} {values[name]:.4g}" for name in names)
        done, left = str(step), ""
        for task in self._tasks.values():
            assert self._bar is not None
            self._bar.update(task, note=note)
            shown = self._bar.tasks[task]
            done, left = f"{step}/{shown.total:.0f}", _left(shown)
        if not self.console.is_terminal:
            self.console.print(f"step {done}  {note}{left}")

    def progress(self, name: str, done: int, total: int) -> None:
        assert self._bar is not None
        task = self._tasks[name]
        self._bar.start_task(task)
        self._bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if self.console.is_terminal or (done < total and now - self._last < LINE_EVERY):
            return
        self._last = now
        self.console.print(f"{name}  {done}/{total}{_left(self._bar.tasks[task])}")

    def alarm(self, step: int, text: str) -> None:
        said = f"watch: step {step}: {text}"
        self.console.print(said, style="yellow", markup=False, highlight=False)

    def notice(self, text: str) -> None:
        self.console.print(text, style=self.style, markup=False, highlight=False, soft_wrap=True)

    def stopped(self, step: int, text: str) -> None:
        self._end()
        self.console.print(text, soft_wrap=True)


def _left(task: Task) -> str:
    """The time left as a line has it, or nothing where it is not known or over."""
    left = task.time_remaining
    return f"  left {timedelta(seconds=round(left))}" if left else ""


def _bar(console: Console) -> Progress:
    """Description, bar, count, time so far, time left, and the field `note` of a task.

    Where that is wider than the terminal the note goes on below; counts and times stay whole.
    """
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TextColumn("left"),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
        console=console,
        speed_estimate_period=SPEED_OVER,
    )
