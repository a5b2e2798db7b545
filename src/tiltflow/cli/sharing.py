"""The commands with which a student leaves a run: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tiltflow.cli.options import option, place, with_debug

Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory", parser=place)]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        metavar="PROGRAM",
        help="diffusers, comfyui, peft, kohya or merged; repeatable [diffusers]",
    ),
]
Tilt = Annotated[
    str | None,
    typer.Option(
        "--tilt", metavar="STRENGTH,...", help="also bake stage 2 in at these strengths, 0 to 1"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="bf16 or fp8: the merged transformer's one file [as trained]"),
]


def register_sharing(app: typer.Typer, console: Console) -> None:
    """Adds the commands to the command line."""

    @app.command(epilog="Example: tiltflow export runs/tilt --out lora --for comfyui --tilt 0,.5,1")
    @with_debug
    def export(
        run: Run,
        out: Annotated[Path, option("--out", "where the folders go")],
        formats: Formats = None,
        merged: Annotated[
            bool, typer.Option("--merged", help="also --for merged: the whole pipeline, merged")
        ] = False,
        tilt: Tilt = None,
        dtype: Dtype = None,
    ) -> None:
        """A run's student for diffusers, ComfyUI, PEFT, kohya's scripts, or merged, with a card."""
        from tiltflow.export.wanted import Wanted
        from tiltflow.tasks import interface

        asked = Wanted.of([*(formats or ["diffusers"]), *["merged"] * merged], tilt, dtype)
        for path in interface.export(
            run, out, formats=asked.formats, strengths=asked.strengths, dtype=asked.dtype
        ):
            console.print(f"wrote {path}")
