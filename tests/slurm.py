"""A real SLURM of one node on the loopback, in a folder of its own: munged, slurmctld, slurmd."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")

CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""`cred_expire` is also how long a requeued job waits before it begins again."""


def lacking() -> str:
    """Why there can be no SLURM here; empty where there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if os.getuid() == 0 else "SLURM starts the jobs as root only"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    ports = dict(zip(("control", "node"), free_ports(2), strict=True))
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, **ports))
    for number in range(2):
        (folder / f"gpu{number}").touch()  # SLURM wants a device's file, and does not open it
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--{n}={folder / f'munge.{n}'}" for n in ("socket", "pid-file", "log-file")]
    munged += [f"--seed-file={folder / 'munge.seed'}"]
    host = socket.gethostname()
    with ExitStack() as running:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            running.enter_context(process(command, environment, folder / f"{command[0]}.said"))
        up_by = time.monotonic() + 60
        while "idle" not in state(environment):
            assert time.monotonic() < up_by, "\n".join(
                path.read_text() for path in folder.iterdir() if path.suffix in (".log", ".said")
            )
            time.sleep(0.5)
        yield environment


def state(environment: dict[str, str]) -> str:
    """The node's, in SLURM's words."""
    told = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True
    )
    return told.stdout


@contextmanager
def process(command: list[str], environment: dict[str, str], said: Path) -> Iterator[None]:
    """A process in the background, ended at the end."""
    with said.open("w") as file:
        running = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def job_facts(job: str, environment: dict[str, str]) -> dict[str, str]:
    """What `scontrol show job` says, by name."""
    told = subprocess.run(
        ["scontrol", "show", "job", job], env=environment, capture_output=True, text=True
    )
    pairs = (word.partition("=") for word in told.stdout.split())
    return {name: value for name, sign, value in pairs if sign}
