"""One process at a time trains in a run directory: `RUN/run.lock` says which.

The lock is a file that is made where there is none (`O_EXCL`, which every file system has, those
of a network too), with the holder's host, process and the moment that it started. Its time of
modification is a heartbeat. It falls to the next who asks

- at once, if the holder is a dead process of this host: its number is free, or a process that
  started at another moment has it now;
- after `SILENT` seconds without a heartbeat, if the holder is of another host. Both times are the
  file system's own: the age is taken against a file that is written for it, so that two hosts'
  clocks may differ.

A process that lives on this host holds its lock however silent it is. To replace a lock that has
fallen one needs the lock of that lock, a file beside it made in the same way, and looks again
under it: so two that find the same dead holder do not both take over.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tiltflow.core.disk import parse_json

FILE = "run.lock"
BEAT = 30.0
"""Seconds between two heartbeats."""
SILENT = 180.0
"""Seconds without one after which another host's lock falls."""
HIDDEN = "hidden"
"""The start of a process that is there, and of which the system tells this user no more."""
WRITING = 1.0
"""Seconds that a lock may be empty: its maker is about to write who it is."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `space` tells boots and containers of one host name apart; `token` is of
    this lock alone."""

    host: str
    pid: int
    started: str
    space: str
    token: str

    @property
    def here(self) -> bool:
        """Whether the process, if it lives, is among those that this one can see."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    @property
    def alive(self) -> bool:
        """Whether a process of this host is still the one that took the lock."""
        return _started(self.pid) in (self.started, HIDDEN)


class RunLock:
    """The lock of the run directory `run`, from entering to leaving; the directory is made.

    Left again, the lock is gone, and so is a directory that was made for it and is still empty.

    Raises (entering):
        ValueError: if another process holds it, naming its host and number.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / FILE
        self.mine = _me()
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        missing = [p for p in (self.run, *self.run.parents) if not p.exists()]
        self.run.mkdir(parents=True, exist_ok=True)
        self._made = missing
        try:
            _take(self.path, self.mine)
        except BaseException:
            self._remove_made()
            raise
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        _release(self.path, self.mine)
        self._remove_made()

    def check(self) -> None:
        """Whether the lock is still this process's: before anything is written.

        Raises:
            ValueError: if it is not. This process was silent for `SILENT` seconds, and another
                one took it over.
        """
        found = _read(self.path)
        if found is None or found.token != self.mine.token:
            who = "it was removed" if found is None else f"{_named(found)} has it"
            raise ValueError(
                f"this process has lost the lock {self.path} ({who}), so it saves nothing more"
            )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError, ValueError):  # a disk that is away for a while: the next beat
                found = _read(self.path)
                if found is not None and found.token == self.mine.token:
                    os.utime(self.path)

    def _remove_made(self) -> None:
        with suppress(OSError):  # not empty: it is a run's now
            for folder in self._made:
                folder.rmdir()


def refuse_if_held(run: Path) -> None:
    """Looks, and takes nothing: for an early word.

    Raises:
        ValueError: if another process trains in the directory.
    """
    if (run / FILE).exists():
        found = _read(run / FILE)
        if _holds(run / FILE, found):
            raise ValueError(_refusal(run / FILE, found))


def held_by_another(run: Path) -> bool:
    """Whether a process other than this one trains in the directory."""
    path = run / FILE
    if not path.exists():
        return False
    found = _read(path)
    mine = found is not None and found.here and found.pid == os.getpid()
    return not mine and _holds(path, found)


def _take(path: Path, mine: Holder) -> None:
    """Makes the lock file `path`, or replaces one that has fallen."""
    while not _make(path, mine):
        found = _read(path)
        if found is None and not path.exists():
            continue  # it was released in between
        if _holds(path, found):
            raise ValueError(_refusal(path, found))
        token = "unknown" if found is None else found.token
        with _nested(path.with_name(f"{path.name}.after-{token}")):
            again = _read(path)
            if again == found and path.exists() and not _holds(path, again):
                path.unlink(missing_ok=True)  # and whoever makes the next has it


@contextmanager
def _nested(path: Path) -> Iterator[None]:
    """The lock of a lock, held for a moment."""
    mine = _me()
    _take(path, mine)
    try:
        yield
    finally:
        _release(path, mine)


def _make(path: Path, mine: Holder) -> bool:
    """Whether there was no file `path`, and there is one now that names this process."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(asdict(mine)).encode())
    except OSError:
        path.unlink()  # a full disk: no lock, and no run
        raise
    finally:
        os.close(descriptor)
    return True


def _release(path: Path, mine: Holder) -> None:
    found = _read(path)
    if found is not None and found.token == mine.token:
        path.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where there is no lock, or nothing that names a holder."""
    until = time.monotonic() + WRITING
    while True:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        if text or time.monotonic() > until:
            break
        time.sleep(0.01)
    try:
        found = Holder(**parse_json(text))
    except (TypeError, ValueError):
        return None
    number = isinstance(found.pid, int) and 0 < found.pid < 2**31
    words = (found.host, found.started, found.space, found.token)
    return found if number and all(isinstance(word, str) for word in words) else None


def _holds(path: Path, found: Holder | None) -> bool:
    """Whether a lock counts: of this host as long as its process lives, of others by heartbeat."""
    if found is not None and found.here:
        return found.alive
    return _silence(path) < SILENT


def _silence(path: Path) -> float:
    """Seconds since a lock's last heartbeat, both by the clock of the file system; by this host's
    where it may only read there, as whoever looks at another user's run."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # released in between: whoever asks looks again
    except OSError:
        return time.time() - path.stat().st_mtime if path.exists() else 0.0
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _refusal(path: Path, found: Holder | None) -> str:
    if found is None:
        return f"{path} is no lock of ours: remove it if no process trains in {path.parent}"
    rest = "" if found.here else f", whose lock falls after {SILENT:.0f} s without a sign of it"
    return f"{path.parent} is being trained in by {_named(found)}{rest}"


def _named(found: Holder) -> str:
    return f"process {found.pid} on host {found.host}"


def _me() -> Holder:
    pid = os.getpid()
    token = secrets.token_hex(8)
    return Holder(socket.gethostname(), pid, _started(pid) or "", _space(), token)


def _space() -> str:
    """What tells boots, and containers' process numbers, apart; "" where the system has neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in the system's own words; None if there is none, or only its
    remains.

    (psutil's is a time of day, which moves when the clock is set: a holder would look dead.)
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    try:
        # after the name, which may hold anything: the state, and the start as 20th from there
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return HIDDEN
    told = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return told.stdout.strip() or None
