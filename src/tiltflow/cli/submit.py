"""`tiltflow submit`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tiltflow.cli.options import Overrides, Recipe, with_debug
from tiltflow.cli.terminal import terminal


@with_debug
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", help="machines", min=1, max=4096)] = 1,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of each machine", min=1, max=64)] = 1,
    time: Annotated[
        str, typer.Option("--time", help="limit; met, the job requeues itself and goes on")
    ] = "04:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="SLURM's partition")] = None,
    account: Annotated[str | None, typer.Option("--account", help="who is charged")] = None,
    margin: Annotated[
        int, typer.Option("--margin", help="seconds before the limit to save", min=40, max=86400)
    ] = 180,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", help="another option, as --sbatch=--constraint=h100; repeatable"),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="print the script and submit nothing")
    ] = False,
) -> None:
    """Train on a SLURM cluster: RECIPE with KEY=VALUE settings, on N nodes with G GPUs each.

    Before its time limit the job saves, requeues itself and goes on exactly where it was.
    """
    from tiltflow.tasks.submit import Job, script
    from tiltflow.tasks.submit import submit as hand_over

    job = Job(nodes, gpus, time, partition, account, margin, tuple(sbatch or ()))
    text = script(recipe, overrides or [], job)
    if print_only:
        sys.stdout.write(text)
        return
    number = hand_over(text)
    terminal().print(f"job {number}; what it says is in {job.output(number)}", highlight=False)
