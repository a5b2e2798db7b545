"""Which rank is silent: every rank says through the job's store, from a thread, that it is there.

A collective cannot tell a peer that is stopped from one that is slow: it waits, and when it gives
up it knows no name. So each rank counts up a number of its own, and looks at everybody else's. A
long save, a compilation or a wait for a reward server does not hold up the thread, so none of them
looks like silence.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

JOIN = 600.0
"""Seconds that a rank may take to come to the job: machines do not start equally fast."""
LONGEST_INTERVAL = 2.0
"""Seconds between two beats; a twentieth of the limit where that is less."""
GAVE_UP = "gave up"
"""How the reason of a rank begins that leaves because of another one."""
MISSED = 3
"""Beats that a rank has missed when it is suspected of being the one whose connection broke."""


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Heartbeat:
    """Beats for `rank` of `size`, and calls `lost(sentence, speaks)` once, from a thread, when a
    rank (or the store, which is `holder`'s, rank `holds` or none) has been silent for `limit`
    seconds.

    `speaks` says whether this is the rank that is to print the sentence: the first one left.
    `store` must be this object's own connection, because a read from it may block.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        limit: float,
        lost: Callable[[str, bool], None],
        holder: str,
        holds: int | None,
    ) -> None:
        self.collectives = 0
        """How many collective operations this rank has begun, which the others see."""
        self.interval = min(limit / 20, LONGEST_INTERVAL)
        self.given_up = False
        self._store, self._rank, self._limit = store, rank, limit
        self._lost, self._holder, self._holds = lost, holder, holds
        self._others = [other for other in range(size) if other != rank]
        self._beats: dict[int, str] = {}
        self._ends: dict[int, str] = {}
        self._silence = dict.fromkeys(self._others, 0.0)
        self._rounds = 0
        self._end: str | None = None
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()
        threading.Thread(target=self._watch, name="heartbeat watch", daemon=True).start()

    def close(self, reason: str = "") -> None:
        """This rank leaves, for a `reason` if it failed; from now on its silence means nothing."""
        self._end = reason
        self._over.set()
        self._beating.join(2 * self.interval)  # or not, where the store itself is gone

    def explain(self, seconds: float) -> str | None:
        """Which rank is lost, as far as can be found out in `seconds` after a connection broke."""
        deadline = time.monotonic() + seconds
        while True:
            for rank, reason in sorted(self._ends.items()):
                if reason:
                    return f"{self._named(rank)} {reason}"
            for rank in self._others:
                if rank not in self._ends and self._silence[rank] > MISSED * self.interval:
                    return self._silent(self._named(rank), self._silence[rank])
            if time.monotonic() > deadline:
                return self._behind()
            time.sleep(self.interval / 4)

    def _behind(self) -> str | None:
        """The rank that is alive but has not come as far as this one."""
        begun = {rank: int(beat.split()[1]) for rank, beat in self._beats.items()}
        least = min(begun.values(), default=self.collectives)
        if least >= self.collectives:
            return None
        rank = next(rank for rank, count in sorted(begun.items()) if count == least)
        return (
            f"{self._named(rank)} is alive, but has begun {least} collective operations where this "
            f"rank has begun {self.collectives}"
        )

    def _beat(self) -> None:
        """Says that this rank is there and reads what the others say, a round an interval.

        A connection to the store that broke does not come back: it is silent, which `_watch` sees.
        """
        count, leaving, host = 0, False, socket.gethostname()
        while not leaving:
            leaving = self._over.wait(self.interval if count else 0)
            try:
                count += 1
                self._store.set(f"beat/{self._rank}", f"{count} {self.collectives} {host}")
                if self._end is not None:
                    self._store.set(f"end/{self._rank}", self._end)
                self._read("beat", self._beats, self._others)
                self._read("end", self._ends, [r for r in self._others if r not in self._ends])
                self._rounds += 1
            except RuntimeError:
                return

    def _read(self, kind: str, into: dict[int, str], ranks: list[int]) -> None:
        there = [r for r in ranks if r in into or self._store.check([f"{kind}/{r}"])]
        if there:
            values = self._store.multi_get([f"{kind}/{r}" for r in there])
            into.update(zip(there, (value.decode() for value in values), strict=True))

    def _watch(self) -> None:
        """Adds up silence. Time in which this process itself stood still does not count: of a job
        that is paused and goes on as a whole, no rank is silent."""
        last, rounds, store_silence = time.monotonic(), 0, 0.0
        heard: dict[int, str] = {}
        while not self._over.wait(self.interval):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self.interval), now
            if self._rounds == rounds:
                store_silence += passed
                done = self._holds is not None and self._ends.get(self._holds) == ""
                if store_silence > self._limit and not done:
                    self._silence |= {r: store_silence for r in self._others if r == self._holds}
                    self._give_up(self._silent(self._holder, store_silence))
                    return
                continue
            rounds, store_silence = self._rounds, 0.0
            for rank in self._others:
                beat = self._beats.get(rank, "")
                self._silence[rank] = 0.0 if beat != heard.get(rank, "") else (
                    self._silence[rank] + passed
                )  # fmt: skip
                heard[rank] = beat
                limit = self._limit if beat else max(self._limit, JOIN)
                if self._silence[rank] > limit and self._ends.get(rank) != "":
                    self._give_up(self._silent(self._named(rank), self._silence[rank]))
                    return

    def _give_up(self, sentence: str) -> None:
        self.given_up = True
        self._end = f"{GAVE_UP}: {sentence}"
        lower = [rank for rank in self._others if rank < self._rank]
        left = [r for r in lower if self._ends.get(r, GAVE_UP).startswith(GAVE_UP)]
        self._lost(sentence, all(self._silence[r] > self._limit / 2 for r in left))

    def _named(self, rank: int) -> str:
        beat = self._beats.get(rank)
        return f"rank {rank} on host {beat.split()[2]}" if beat else f"rank {rank}"

    def _silent(self, who: str, seconds: float) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
        return f"{who} has been silent for {seconds:.0f} s (since {since})"
