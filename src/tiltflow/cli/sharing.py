"""The commands with which a student leaves a run: `export` and `push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tiltflow.cli.options import option, place, with_debug
from tiltflow.core.importing import large_imports

if TYPE_CHECKING:
    from tiltflow.formats.wanted import Wanted

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
        "--tilt", metavar="STRENGTH,...", help="also bake stage 2 in at these strengths, 0 to 1.5"
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
        from tiltflow.formats.wanted import Wanted

        asked = [*(formats or ["diffusers"]), *["merged"] * merged]
        _export(run, out, Wanted.of(asked, tilt, dtype), console)

    @app.command(epilog="Example: tiltflow push runs/tilt OWNER/NAME --private")
    @with_debug
    def push(
        run: Run,
        repository: Annotated[
            str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub, or NAME for your own")
        ],
        formats: Formats = None,
        tilt: Tilt = None,
        dtype: Dtype = None,
        private: Annotated[
            bool, typer.Option("--private", help="make the repository a private one")
        ] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="write and list what would be sent; send nothing")
        ] = False,
    ) -> None:
        """Send a run's student to the Hugging Face Hub: card, pictures, adapters, contract."""
        from tiltflow.formats.wanted import Wanted
        from tiltflow.tasks.progress import Terminal
        from tiltflow.tasks.push import push_run

        wanted = Wanted.of(formats or ["diffusers"], tilt, dtype)
        with Terminal(console) as callbacks:
            pushed = push_run(run, repository, wanted, private, dry_run, callbacks)
        for file in pushed.files:
            console.print(f"{'would send' if dry_run else 'sent'} {pushed.folder / file}")
        if pushed.base is None:
            console.print("the card's base_model is a directory's name: put its hub id there")
        if pushed.url is not None:
            console.print(pushed.url)


def _export(run: Path, out: Path, asked: Wanted, console: Console) -> None:
    with large_imports():
        from tiltflow.tasks import interface
        from tiltflow.tasks.progress import Terminal

    with Terminal(console) as callbacks:
        paths = interface.export(
            run,
            out,
            formats=asked.formats,
            strengths=asked.strengths,
            dtype=asked.dtype,
            callbacks=callbacks,
        )
    for path in paths:
        console.print(f"wrote {path}")
