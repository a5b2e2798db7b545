"""`tiltflow submit`: a training as a job of SLURM that outlives its time limit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tiltflow.config.load import load_config
from tiltflow.config.recipe_source import recipe_name

RESERVE = 30
"""Seconds of the margin that are kept for requeueing."""

_TIMES = (
    r"(?P<m>\d+)",
    r"(?P<m>\d+):(?P<s>\d+)",
    r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",
    r"(?P<d>\d+)-(?P<h>\d+)",
    r"(?P<d>\d+)-(?P<h>\d+):(?P<m>\d+)",
    r"(?P<d>\d+)-(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",
)
"""The forms of a time limit in sbatch(1): minutes, hours:minutes:seconds, days-hours, …"""

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}

_NAME = re.compile(r"[\w.,@%+:-]+", re.ASCII)

_OWN = ("nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue", "open-mode")
"""Options of sbatch that the script sets: another value of them would break it."""

_AGAINST = ("no-requeue", "array", "ntasks", "gpus")
"""Options that say the contrary, or start more jobs or tasks over the same run directory."""


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM.

    `gpus` are a node's, and as many ranks run there; `margin` is how many seconds before the limit
    the run is saved; `more` are further options of sbatch.

    Raises:
        ValueError: on a time limit, name or option that SLURM's script could not hold.
    """

    nodes: int
    gpus: int
    time: str
    partition: str | None = None
    account: str | None = None
    margin: int = 180
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limit = seconds(self.time)
        if limit <= self.margin:
            raise ValueError(
                f"--time {self.time} is {limit} s, of which the last {self.margin} are for saving "
                "(--margin): give it more time, or a smaller margin"
            )
        for option in ("partition", "account"):
            name = getattr(self, option)
            if name is not None and not _NAME.fullmatch(name):
                raise ValueError(f"--{option} {name!r} is no name of SLURM's")
        for text in self.more:
            if not (text.startswith("--") and text.isprintable()):
                raise ValueError(f"--sbatch {text!r} should be one option, as --constraint=h100")
            name = re.split(r"[= ]", text[2:], maxsplit=1)[0]
            if any(own.startswith(name) for own in (*_OWN, *_AGAINST)):  # or shortened
                raise ValueError(f"--sbatch {text!r}: submit sets this option itself")

    def output(self, number: str) -> str:
        """The file that what the job of that number says goes to."""
        given = [re.split(r"[= ]+", text[2:], maxsplit=1) for text in self.more]
        files = [rest[0] for name, *rest in given if rest and "output".startswith(name)]
        return (files or ["slurm-%j.out"])[-1].replace("%j", number)

    def directives(self, name: str) -> list[str]:
        """The options of a job called `name`, one a line of the script."""
        named = {"partition": self.partition, "account": self.account}
        return [
            f"--job-name={name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--gpus-per-node={self.gpus}",
            f"--time={self.time}",
            *(f"--{option}={value}" for option, value in named.items() if value is not None),
            *self.more,
            f"--signal=B:USR1@{self.margin}",
            "--requeue",
            "--open-mode=append",
        ]


def seconds(limit: str) -> int:
    """A time limit of SLURM's in seconds.

    Raises:
        ValueError: if it is none.
    """
    for form in _TIMES:
        if found := re.fullmatch(form, limit, re.ASCII):
            return sum(int(number) * _UNITS[unit] for unit, number in found.groupdict().items())
    raise ValueError(f"--time {limit!r} is no time limit: give minutes, H:MM:SS or D-HH:MM:SS")


def script(recipe: str, overrides: Sequence[str], job: Job) -> str:
    """The batch script that trains `recipe` with this Python, from this directory.

    Raises:
        ValueError: if the recipe or a setting is not in order, or `run.resume` is given.
    """
    if any(
        text.partition("=")[0].strip() in ("run.resume", "run.resume_from") for text in overrides
    ):
        raise ValueError("a job that requeues itself resumes by itself: leave run.resume out")
    out = Path(load_config(recipe, overrides).run.out).expanduser().absolute()
    name = re.sub(r"[^\w.-]", "_", Path(recipe_name(recipe)).name, flags=re.ASCII)
    given = [recipe, *overrides, "run.resume=auto"]
    if not all(text.isprintable() for text in (*given, os.getcwd())):
        raise ValueError("a recipe, setting or directory holds a character that a script cannot")
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    ).get_template("submit.sh.j2")
    return template.render(
        directives=job.directives(name),
        margin=job.margin,
        grace=max(job.margin - RESERVE, 1),
        folder=quote(os.getcwd()),
        latest=quote(str(out / "checkpoints" / "latest")),
        python=quote(sys.executable),
        nodes=job.nodes,
        ranks=job.gpus,
        arguments=" ".join(map(quote, given)),
    )


def submit(text: str) -> str:
    """Hands a script to SLURM; the job's number.

    Raises:
        ValueError: if there is no SLURM here, or it refuses the job, in its own words.
    """
    try:
        told = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(
            "there is no sbatch on PATH: submit where SLURM is, or give --print for the script"
        ) from error
    if told.returncode != 0:
        lines = [
            line.removeprefix("sbatch: ").removeprefix("error: ")
            for line in told.stderr.splitlines()
            if line.strip()
        ]
        if any("_establish_config_source" in line for line in lines):
            raise ValueError(
                "sbatch is here and knows no cluster (there is no slurm.conf): submit where SLURM "
                "is, or give --print for the script"
            )
        raise ValueError(f"SLURM refused the job: {'; '.join(lines) or 'it did not say why'}")
    return told.stdout.strip().partition(";")[0]  # of several clusters, JOB;CLUSTER
