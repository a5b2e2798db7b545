"""One process at a time in a run directory: who holds it, who loses it, and to whom."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from lengths import mostly_long

from tiltflow.core import run_lock
from tiltflow.core.run_lock import FILE, RunLock, held_by_another, refuse_if_held

ELSEWHERE = {"host": "elsewhere", "space": "another boot"}


def plant(run: Path, silent: float = 0.0, **changes: Any) -> None:
    """A lock of a holder that differs from this process in `changes`."""
    run.mkdir(exist_ok=True)
    (run / FILE).write_text(json.dumps(asdict(replace(run_lock._me(), **changes))))
    then = time.time() - silent
    os.utime(run / FILE, (then, then))


def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_second_is_refused_and_learns_who_is_first(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with RunLock(run) as lock:
        lock.check()
        match = rf"run is being trained in by process {os.getpid()} on host \S+$"
        with pytest.raises(ValueError, match=match), RunLock(run):
            pass
        with pytest.raises(ValueError, match=match):
            refuse_if_held(run)
        (run / "config.yaml").touch()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    refuse_if_held(run)
    with RunLock(run):
        pass


def test_what_was_made_for_the_lock_alone_is_gone_after_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLock(tmp_path / "a" / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**31 - 1},
        {"started": "1"},  # the number is another process's by now
    ],
)
def test_a_dead_process_of_this_host_loses_it_at_once(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    plant(tmp_path, **changes)
    refuse_if_held(tmp_path)
    with RunLock(tmp_path) as lock:
        lock.check()
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = run_lock._started(process.pid)
    plant(tmp_path, pid=process.pid, started=started)
    with pytest.raises(ValueError, match=f"by process {process.pid} on"):
        refuse_if_held(tmp_path)
    process.kill()
    while run_lock._started(process.pid) is not None:  # what is left of it has a number still
        time.sleep(0.01)
    refuse_if_held(tmp_path)
    process.communicate()


def test_a_silent_process_of_this_host_keeps_it(tmp_path: Path) -> None:
    plant(tmp_path, silent=10_000)
    with pytest.raises(ValueError, match="is being trained in"):
        refuse_if_held(tmp_path)


@pytest.mark.parametrize("changes", [ELSEWHERE, {"space": "another container"}])
def test_another_host_loses_it_after_three_silent_minutes(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    plant(tmp_path, silent=170, pid=dead(), **changes)
    with pytest.raises(ValueError, match="whose lock falls after 180 s without a sign of it"):
        refuse_if_held(tmp_path)
    assert held_by_another(tmp_path)
    plant(tmp_path, silent=190, **changes)
    assert not held_by_another(tmp_path)
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "[" * 100_000])
def test_what_is_no_lock_of_ours_counts_for_three_minutes(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WRITING", 0.05)
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match="is no lock of ours: remove it if"), RunLock(tmp_path):
        pass
    os.utime(tmp_path / FILE, (1, 1))
    with RunLock(tmp_path) as lock:
        lock.check()


def test_the_heartbeat_renews_it_and_notices_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    with RunLock(tmp_path) as lock:
        os.utime(tmp_path / FILE, (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / FILE).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / FILE).stat().st_mtime < 60
        plant(tmp_path, **ELSEWHERE)
        with pytest.raises(ValueError, match=r"has lost the lock .* on host elsewhere has it\)"):
            lock.check()
    assert (tmp_path / FILE).exists()  # it is the other's now
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match=r"has lost the lock .*it was removed\)"):
        lock.check()


def _race(run: Path, gate: Barrier, winners: Any) -> None:
    gate.wait()
    try:
        with RunLock(run):
            winners.put(os.getpid())
            gate.wait()  # none leaves before each has tried
    except ValueError:
        winners.put(None)
        gate.wait()


@pytest.mark.parametrize(
    "state",
    mostly_long(["of a dead process", "free", "of a silent host", "nested"], "of a dead process"),
)
def test_of_several_at_once_exactly_one_wins(tmp_path: Path, state: str) -> None:
    context = multiprocessing.get_context("fork")
    racers = 6
    for i in range(12):
        run = tmp_path / f"{i}"
        if state in ("of a dead process", "nested"):
            plant(run, pid=dead())
        if state == "of a silent host":
            plant(run, silent=999, **ELSEWHERE)
        if state == "nested":  # a process was killed while it took over from a dead one
            token = json.loads((run / FILE).read_text())["token"]
            left = asdict(replace(run_lock._me(), pid=dead()))
            (run / f"{FILE}.after-{token}").write_text(json.dumps(left))
        gate, winners = context.Barrier(racers), context.Queue()
        processes = [
            context.Process(target=_race, args=(run, gate, winners)) for _ in range(racers)
        ]
        for process in processes:
            process.start()
        told = [winners.get(timeout=30) for _ in processes]
        for process in processes:
            process.join(30)
        assert sum(pid is not None for pid in told) == 1
        assert not run.exists() or list(run.iterdir()) == []


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tiltflow.core.run_lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {process.pid} on host"):
        refuse_if_held(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with RunLock(tmp_path) as lock:
        lock.check()
    process.stdout.close()


def test_without_the_space_for_it_there_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"), RunLock(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
