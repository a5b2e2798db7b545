"""`tiltflow dial`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tiltflow.cli.options import Device, option, place, with_debug
from tiltflow.cli.terminal import terminal
from tiltflow.core.sentences import counted

Number = TypeVar("Number", int, float)


@with_debug
def dial(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="a finished stage-2 run", parser=place)
    ],
    out: Annotated[Path | None, option("--out", "folder of the pictures [RUN/dial]")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="a prompt; repeatable")
    ] = None,
    prompts: Annotated[Path | None, option("--prompts", "a file of prompts")] = None,
    count: Annotated[
        int, typer.Option("--count", help="without prompts: so many held-out ones", min=1, max=16)
    ] = 4,
    seeds: Annotated[str, typer.Option("--seeds", help="whole numbers")] = "0,1",
    strengths: Annotated[
        str, typer.Option("--strengths", help="from 0 to 1.5")
    ] = "0,0.25,0.5,0.75,1,1.25,1.5",
    steps: Annotated[
        int | None, typer.Option("--steps", help="sampler steps [as trained]", min=1, max=64)
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="pixels [as trained]")] = None,
    device: Device = "auto",
) -> None:
    """Pictures and rewards at strengths of a tilt, computed beforehand for the desk's Dial.

    Killed, it goes on where it was when the same is asked again.
    """
    from tiltflow.data.prompts import load_prompts
    from tiltflow.tasks.dial_grid import compute_dial
    from tiltflow.tasks.progress import Terminal

    if prompt and prompts:
        raise ValueError("--prompt and --prompts: give one of them")
    texts = [p.text for p in load_prompts(str(prompts))] if prompts else prompt
    folder = out or run / "dial"
    console = terminal()
    with Terminal(console) as callbacks:
        grid = compute_dial(
            run,
            folder,
            texts,
            count=count,
            seeds=_numbers("--seeds", seeds, int),
            strengths=_numbers("--strengths", strengths, float),
            steps=steps,
            side=size,
            device=device,
            callbacks=callbacks,
        )
    made = counted(len(grid.places()), "picture")
    console.print(f"{made} in {folder}: tiltflow desk shows them")


def _numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} is {text!r}; write {what} with commas between them") from None
