"""`tiltflow submit`: the script, its refusals, and a real SLURM whose limit a run meets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import pytest
import slurm
import torch

from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.interruption import SAVE, interruptible
from tiltflow.core.metrics import read_metrics
from tiltflow.tasks.submit import Job, script, seconds, submit

ROOT = Path(__file__).parents[1]
LIMITS = 3
"""How often the job meets its time limit."""


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {
        **(env or os.environ),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"))),
    }
    return subprocess.run(
        [sys.executable, "-m", "tiltflow", *arguments], env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("30", 1800), ("1:30", 90), ("04:00:00", 14400), ("1-0", 86400),
        ("2-03:04", 183840), ("2-03:04:05", 183845),
    ],
)  # fmt: skip
def test_time_limits(limit: str, expected: int) -> None:
    assert seconds(limit) == expected


def test_the_script_is_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a b's"
    place.mkdir()
    monkeypatch.chdir(place)
    job = Job(2, 8, "1-0", "gpu", "me", more=("--constraint=h100",))
    text = script("mixture_cold_start", ["run.out=it's here", "train.steps=5"], job)
    directives = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert set(directives) >= {
        "--nodes=2", "--gpus-per-node=8", "--time=1-0", "--partition=gpu", "--account=me",
        "--constraint=h100", "--signal=B:USR1@180", "--requeue", "--ntasks-per-node=1",
    }  # fmt: skip
    # run with stand-ins, it passes every word on whole
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
    (stand_ins / "scontrol").write_text("#!/bin/bash\nprintf 'one\\ntwo\\n'\n")
    for name in stand_ins.iterdir():
        name.chmod(0o755)
    known = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "one,two", "SLURM_CPUS_ON_NODE": "64"}
    path = f"{stand_ins}:{os.environ['PATH']}"
    told = subprocess.run(
        ["bash", "-s"], input=text, env={"PATH": path, **known}, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    words = told.stdout.splitlines()
    assert words[0] == str(place)
    assert words[-4:] == [
        "mixture_cold_start",
        "run.out=it's here",
        "train.steps=5",
        "run.resume=auto",
    ]
    assert "--rdzv-endpoint=one:20012" in words and "--nnodes=2" in words
    assert "--nproc-per-node=8" in words and "--rdzv-id=12-0" in words


@pytest.mark.parametrize(
    ("restarts", "saves", "requeued"), [(0, False, True), (1, False, False), (1, True, True)]
)
def test_a_start_that_saves_nothing_is_not_followed_by_the_same_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int, saves: bool, requeued: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    latest = tmp_path / "it's here" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step-000002")
    stand_ins = {
        "srun": "sleep 1; touch began; while [ ! -e asked ]; do sleep 1; done"
        + (f"; echo step-000004 > {quote(str(latest))}" if saves else ""),
        "scancel": "touch asked",
        "scontrol": 'echo "$1" >> told; echo one',
        "sleep": f"exec {shutil.which('sleep')} 0.05",
    }
    (tmp_path / "bin").mkdir()
    for name, does in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    text = script("mixture_cold_start", ["run.out=it's here"], Job(1, 1, "1-0"))
    (tmp_path / "job.sh").write_text(text)
    known = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "one", "SLURM_CPUS_ON_NODE": "1"}
    known |= {"SLURM_RESTART_COUNT": str(restarts), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "job.sh"], env=known, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not (tmp_path / "began").exists() and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=30)[1]
    assert (job.returncode == 0) is requeued, said
    assert ("requeue" in (tmp_path / "told").read_text().split()) is requeued
    assert ("this start saved nothing" in said) is not requeued


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"time": "soon"}, "'soon' is no time limit"),
        ({"time": "2"}, "the last 180 are for saving"),
        ({"partition": "a b"}, "is no name of SLURM's"),
        ({"account": "a\n#SBATCH --x"}, "is no name of SLURM's"),
        ({"more": ("--x\n#SBATCH",)}, "should be one option"),
        ({"more": ("rm -r",)}, "should be one option"),
        *(
            ({"more": (f"--{text}",)}, "sets this option itself")
            for text in ("time=3", "sig=USR2@9", "node 3", "no-requeue", "array=1-3", "arr=1-3")
        ),
    ],
)
def test_a_job_that_is_none(job: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Job(**{"nodes": 1, "gpus": 1, "time": "04:00:00"} | job)  # type: ignore[arg-type]


def test_what_is_refused_before_slurm_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(1, 1, "04:00:00")
    with pytest.raises(ValueError, match="the nearest is mixture_tilt"):
        script("mixture_tlit", [], job)
    with pytest.raises(ValueError, match="leave run.resume out"):
        script("mixture_cold_start", ["run.resume=false"], job)
    with pytest.raises(ValueError, match="a character that a script cannot"):
        script("mixture_cold_start", ['run.out="a\nb"'], job)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch on PATH"):
        submit("#!/bin/bash\n")


@pytest.mark.long
def test_the_commands_own_words(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": "/nowhere"}
    refused = command("submit", "mixture_cold_start", env=env)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "there is no sbatch on PATH" in refused.stderr
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text("#!/bin/sh\ncat > /dev/null\necho 77\n")
    (bin / "sbatch").chmod(0o755)
    there = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    for option, file in (((), "slurm-77.out"), (("--sbatch=--output=logs/%j.log",), "logs/77.log")):
        handed = command("submit", "mixture_cold_start", *option, env=there)
        assert handed.stdout == f"job 77; what it says is in {file}\n"
    printed = command("submit", "mixture_cold_start", "--gpus", "2", "--print", env=env)
    assert printed.returncode == 0 and printed.stdout.startswith("#!/bin/bash\n#SBATCH --job-name")


def test_a_schedulers_signal_may_come_again() -> None:
    before = signal.getsignal(SAVE)
    with interruptible() as stopped:
        for _ in range(2):
            os.kill(os.getpid(), SAVE)
            time.sleep(1.1)  # a second SIGTERM after this would interrupt
        assert stopped.is_set()
    assert signal.getsignal(SAVE) == before


needs_slurm = pytest.mark.skipif(bool(slurm.lacking()), reason=slurm.lacking())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.mark.long
@needs_slurm
def test_a_partition_that_slurm_refuses(environment: dict[str, str]) -> None:
    told = command("submit", "mixture_cold_start", "--partition", "gold", env=environment)
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    assert told.stderr.startswith("tiltflow: SLURM refused the job: invalid partition")


@pytest.mark.long
@needs_slurm
def test_a_limit_met_three_times_changes_nothing(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 on the mixture, two ranks: weights and log equal an uninterrupted run's."""
    hurry = tmp_path / "hurry"
    env = {**environment, "HURRY": str(hurry), "OMP_NUM_THREADS": "1"}
    few = tmp_path / "few_step"
    cold = command(
        "train", "mixture_cold_start", "train.steps=4", "train.batch_size=8", "run.device=cpu",
        "cold_start.generator_every=2", f"run.out={few}", env=env,
    )  # fmt: skip
    assert cold.returncode == 0, cold.stderr
    tilt = [
        "mixture_tilt", f"model.few_step={few}", "rewards={slow_reward:slow_x: 1.0}",
        "train.steps=250", "train.batch_size=16", "tilt.group_size=4", "run.device=cpu",
        "tilt.fake_score_updates=1", "checkpoint.every=1000", "log.every=1",
    ]  # fmt: skip
    job = Job(1, 2, "2", margin=110)  # 10 s of work, and on a slow machine 80 to load and save
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", env["SLURM_CONF"])
    for name in ("HURRY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, env[name])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"))))
    number = submit(script(tilt[0], [*tilt[1:], f"run.out={tmp_path / 'run'}"], job))
    log = tmp_path / f"slurm-{number}.out"

    def said() -> str:
        return log.read_text() if log.exists() else "nothing"

    facts, until = {}, time.monotonic() + 600
    while facts.get("JobState") not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"):
        assert time.monotonic() < until, said()
        time.sleep(2)
        facts = slurm.job_facts(number, environment)
        if facts.get("Restarts") == str(LIMITS) and not hurry.exists():
            hurry.touch()  # enough: the rest at full speed, and no further limit
            subprocess.run(
                ["scontrol", "update", f"JobId={number}", "TimeLimit=30"], env=env, check=True
            )
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(LIMITS)), said()
    assert said().count("stopped at step") == LIMITS, said()

    hurry.touch()
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tiltflow", "train"]
    whole = tmp_path / "whole"
    subprocess.run(
        [sys.executable, *launched, *tilt, f"run.out={whole}"], env=os.environ, check=True
    )
    first, second = load_checkpoint(tmp_path / "run"), load_checkpoint(whole)
    assert first.step == second.step == 250 and first.tensors.keys() == second.tensors.keys()
    for group, tensors in second.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(first.tensors[group][name], value), (group, name)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 251))
    assert lines == read_metrics(whole / "metrics.jsonl")
