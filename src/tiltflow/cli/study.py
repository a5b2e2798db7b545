"""`tiltflow study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.cli.options import option, place, with_debug
from tiltflow.cli.terminal import terminal
from tiltflow.core.importing import large_imports


@with_debug
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY", help="the study's .yaml file", parser=place)
    ],
    out: Annotated[Path | None, option("--out", "folder of its cells [runs/NAME]")] = None,
    rows: Annotated[str | None, typer.Option("--rows", help="A,B: of these rows alone")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="0,1: of these seeds alone")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="processes at once", min=1, max=1024)] = 1,
    cells_only: Annotated[
        bool, typer.Option("--cells-only", help="make the cells, and no table of the study")
    ] = False,
) -> None:
    """Train and score rows of settings × seeds on equal budgets; one table with intervals.

    Each finished cell is kept: asked again, the study goes on where it was.
    """
    with large_imports():
        from tiltflow.tasks.progress import Terminal
        from tiltflow.tasks.study import cells_of, make_cells
        from tiltflow.tasks.study_file import load_study
        from tiltflow.tasks.study_table import show_study, summarise, write_study

    console, chosen = terminal(), load_study(file)
    out = out or Path("runs") / file.stem
    cells = cells_of(chosen, out, _list(rows), _numbers(seeds))
    with Terminal(console, "dim") as callbacks:
        done = make_cells(file, cells, jobs, callbacks, callbacks.notice)
    if not done:
        console.print("stopped; the same command goes on where it was")
        return
    if cells_only:
        return
    summary = summarise(chosen, out)
    paths = write_study(chosen, out, summary)
    show_study(summary, console)
    for path in paths:
        console.print(f"wrote {path}", highlight=False)


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _numbers(text: str | None) -> list[int]:
    """Raises ValueError if `--seeds` is no list of whole numbers."""
    try:
        return [int(part) for part in _list(text)]
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; it should read 0,1,2") from None
