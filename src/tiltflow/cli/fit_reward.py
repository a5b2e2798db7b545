"""`tiltflow fit-reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.cli.options import Device, option, place, with_debug
from tiltflow.cli.terminal import terminal
from tiltflow.rewards.packaged import CLIP, VIT_L_14


@with_debug
def fit_reward(
    preferences: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="votes (.jsonl), Pick-a-Pic (.parquet) or HPD (.json)",
            parser=place,
        ),
    ],
    out: Annotated[Path, option("--out", "folder of the reward, which is then its name")],
    clip: Annotated[
        str,
        typer.Option(
            "--clip", help=f"CLIP whose features it is linear in; of general prompts {VIT_L_14}"
        ),
    ] = CLIP,
    device: Device = "auto",
) -> None:
    """Fit a reward to choices between images: rewards={DIR: 1} then trains on it.

    Refused when the choices are too few, contradict each other or cannot be told from chance.
    """
    from tiltflow.tasks.fit_reward import fit_reward as run

    console = terminal()
    run(preferences, out, clip, device, lambda line: console.print(line, highlight=False))
    console.print(f"reward: {out}", highlight=False)
