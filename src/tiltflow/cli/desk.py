"""`tiltflow desk`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.cli.options import option, place, with_debug
from tiltflow.cli.terminal import terminal


@with_debug
def desk(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="run directories, folders of them, or evaluations (JSON)",
            parser=place,
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="port; 0 takes a free one", min=0, max=65535)
    ] = 8765,
    votes: Annotated[
        Path | None, option("--votes", "where votes go [preferences.jsonl in the first RUN]")
    ] = None,
) -> None:
    """Look at runs, compare systems, turn the tilt and vote, in a browser on this machine."""
    from tiltflow.desk.serve import serve_desk

    serve_desk(runs, host, port, votes, terminal())
