"""One reward behind several reward servers: requests are spread over those that answer.

A server that fails is left out: what it was asked goes to another, and it is tried again after
1, 2, 4 … 60 seconds. Before a server is given its first work, and before it is taken back, it must
say of itself what the others say, and score the first image of all as they do, to the last bit. So
it makes no difference which of them scores an image.

One thread, the caller's, decides; the servers' threads only ask and wait.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from tiltflow.core.background import Background
from tiltflow.core.interruption import pause
from tiltflow.core.sentences import printable
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.remote import client
from tiltflow.rewards.remote.address import REMOTE, TOKEN_VARIABLE, Settings, pool_addresses
from tiltflow.rewards.remote.client import (
    Away,
    Client,
    Fault,
    contents_of,
    lasting_of,
    read_health,
    requests,
)
from tiltflow.rewards.remote.wire import OtherReward, decode_scores, given_token

log = logging.getLogger(__name__)

PACE = 0.05
"""Seconds after which the caller's thread looks up, though no server has answered."""


@dataclass
class _Request:
    work: _Work
    number: int
    body: bytes
    count: int
    faults: int = 0


class _Work:
    """The requests of a call, each made when its turn comes; one that failed comes next again."""

    def __init__(self, bodies: Iterator[tuple[bytes, int]]) -> None:
        self._bodies, self._again = bodies, list[_Request]()
        self._made, self._all_made = 0, False
        self.scores: dict[int, Tensor] = {}

    def next(self) -> _Request | None:
        """A request that no server has; None if there is none."""
        if self._again:
            return self._again.pop()
        made = next(self._bodies, None)
        if made is None:
            self._all_made = True
            return None
        self._made += 1
        return _Request(self, self._made, *made)

    def again(self, request: _Request) -> None:
        self._again.append(request)

    @property
    def done(self) -> bool:
        return self._all_made and len(self.scores) == self._made

    def result(self) -> Tensor:
        """All scores, in the images' order."""
        return torch.cat([self.scores[number] for number in sorted(self.scores)])


class _Member:
    """A server of a pool. One `in_use` is given requests; one that is not is asked, from `next_try`
    on, whether it is as the others are. `reason` is why it is left out, if it is."""

    def __init__(self, server: Client) -> None:
        self.server = server
        self.task: Future | None = None
        self.request: _Request | None = None
        self.in_use = False
        self.reason: str | None = None
        self.next_try = 0.0
        self._forget_failures()

    def start(self, request: _Request | None, call: Callable[[], Any]) -> None:
        """Has a thread ask the server: for a request's scores, or (None) for what it is."""
        self._thread = Background(self.server.url)
        self.request, self.task = request, self._thread.call(call)

    def take(self) -> tuple[_Request | None, Future]:
        """What the server was asked, and the future that is done."""
        assert self.task is not None and self.task.done()
        request, task = self.request, self.task
        self._thread.close()
        self.request = self.task = None
        return request, task

    def scored(self, request: _Request, scores: Tensor) -> None:
        request.work.scores[request.number] = scores
        self._forget_failures()

    def _forget_failures(self) -> None:
        self.faults, self.wait = 0, client.FIRST_WAIT
        self.away_since: float | None = None

    def leave_out(self, error: Exception) -> None:
        """Until it is tried again after `wait` seconds, twice as long each time."""
        self.in_use, self.reason = False, str(error).removeprefix(f"{self.server.url} ")
        if isinstance(error, Away):
            self.away_since = self.away_since or time.monotonic()
        else:
            self.faults, self.away_since = self.faults + 1, None
        self.next_try = time.monotonic() + self.wait
        self.wait = min(2 * self.wait, client.LONGEST_WAIT)

    def given_up(self, settings: Settings) -> bool:
        """Whether it has failed as often, or been away for as long, as would end a run that has
        this server alone."""
        if self.away_since is None or settings.patience is None:
            return self.faults > settings.retries
        return time.monotonic() - self.away_since >= settings.patience


class PooledReward:
    """The reward `remote:NAME` of the servers in `settings`; not differentiable.

    For each server the rules are those of `RemoteReward`, but a failure ends the run only if there
    is no other server: a request is made once by each and `retries` times more before it is an
    error. A server that answers wrongly, or refuses, ends the run.

    Raises:
        ValueError: if the servers are no addresses, one of them is not as the others are or has no
            such reward, or none answers within `timeout` seconds; each call, if none is left (each
            failed more than `retries` times, or has been away for longer than `patience`), or one
            answers wrongly or refuses.
        Stopped: by a call, if the run is asked to stop while it waits for a server.
    """

    differentiable = False
    domain = "images"
    elsewhere = True

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name.removeprefix(REMOTE), settings
        self._start = f"start one with tiltflow reward-server {self.name}"
        self._members = [
            _Member(Client(place, settings, self._start, given_token, TOKEN_VARIABLE))
            for place in pool_addresses(name, settings.servers or [])
        ]
        self._known: tuple[str, dict[str, Any]] | None = None
        self._first_image: bytes | None = None
        self._first_score: tuple[str, Tensor] | None = None
        try:
            self._find()
        except ValueError as error:
            raise ValueError(f"reward {self.name!r}: {error}") from error
        assert self._known is not None
        self.contents: object = contents_of(self.name, self._known[1])
        self.lasting = lasting_of(self._known[1])

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if self._first_image is None:
            ((self._first_image, _),) = requests(images[:1], prompts[:1], metadata[:1], 1)
            for member in self._members:
                member.in_use = False  # until it has scored it
        work = _Work(requests(images, prompts, metadata, self.settings.batch))
        while not work.done:
            self._turn(work)
        return work.result().to(images.device)

    def _find(self) -> None:
        """Asks every server once what it is, and then until one answers."""
        end = time.monotonic() + self.settings.timeout
        while any(not m.in_use and m.reason is None for m in self._members) or (
            not self._in_use and time.monotonic() < end
        ):
            self._turn(None)
        if not self._in_use:
            raise ValueError(self._nobody())

    @property
    def _in_use(self) -> int:
        return sum(member.in_use for member in self._members)

    def _turn(self, work: _Work | None) -> None:
        """Gives every idle server something to do, and looks at what has come back."""
        for member in self._members:
            if member.task is None:
                self._give(member, work)
        if all(member.reason is not None for member in self._members):
            pause(0)  # nothing but waiting is going on, which a stop ends
        tasks = [member.task for member in self._members if member.task is not None]
        if tasks:
            wait(tasks, timeout=PACE, return_when=FIRST_COMPLETED)
        else:
            pause(PACE)
        for member in self._members:
            if member.task is not None and member.task.done():
                self._settle(member)
        if not self._in_use and all(m.given_up(self.settings) for m in self._members):
            raise ValueError(self._nobody())

    def _give(self, member: _Member, work: _Work | None) -> None:
        if not member.in_use:
            if time.monotonic() >= member.next_try:
                member.start(None, functools.partial(self._ask_what, member.server))
        elif work is not None and (request := work.next()) is not None:
            about = request.body, request.count, self.contents
            ask = functools.partial(self._ask, member.server, *about)
            member.start(request, ask)

    def _ask(self, server: Client, body: bytes, count: int, contents: object) -> Tensor:
        def read(answer: bytes) -> Tensor:
            try:
                return decode_scores(answer, count, contents)
            except OtherReward as error:  # the others go on without it
                raise Fault(str(error)) from error

        scores: Tensor = server.exchange("POST", quote(self.name, safe=""), body, read)
        return scores

    def _ask_what(self, server: Client) -> tuple[dict[str, Any], Tensor | None]:
        """What a server says of itself, and its score of the first image."""
        read = functools.partial(read_health, name=self.name)
        said: dict[str, Any] = server.exchange("GET", "health", None, read)
        first = self._first_image
        return said, None if first is None else self._ask(server, first, 1, said.get("contents"))

    def _settle(self, member: _Member) -> None:
        """What a server's answer, or its failure, comes to."""
        request, task = member.take()
        try:
            answer = task.result()
            if request is not None:
                member.scored(request, answer)
            else:
                self._take(member, *answer)
        except (Away, Fault) as error:
            if request is not None:
                self._ask_another(member, request, error)
            self._leave_out(member, error)
        except ValueError as error:
            if request is not None or member.reason is None:
                raise
            self._leave_out(member, error)

    def _take(self, member: _Member, said: dict[str, Any], score: Tensor | None) -> None:
        """Takes a server that is as the others are.

        Raises:
            ValueError: if it is not.
        """
        url = member.server.url
        self._known = other, known = self._known or (url, said)
        for key in [key for key in known | said if known.get(key) != said.get(key)][:1]:
            raise ValueError(
                f"{url} has {key} {_shown(said.get(key))}, and {other} has "
                f"{_shown(known.get(key))}: the servers of a pool must be alike"
            )
        if score is not None:
            self._first_score = other, first = self._first_score or (url, score)
            if not torch.equal(score, first):
                raise ValueError(
                    f"{url} scores an image {score.item()!r}, and {other} scores it "
                    f"{first.item()!r}: the servers of a pool must be alike to the last bit"
                )
        if member.reason is not None:
            log.warning("reward %r: %s answers again and is taken back", self.name, url)
        member.in_use, member.reason = True, None

    def _ask_another(self, member: _Member, request: _Request, error: Exception) -> None:
        """Has another server make a request that failed here.

        Raises:
            ValueError: if it has failed too often.
        """
        request.faults += isinstance(error, Fault)
        if request.faults >= len(self._members) + self.settings.retries:
            raise ValueError(
                f"{member.server.url} {error} ({request.faults} attempts, at several servers)"
            ) from error
        request.work.again(request)

    def _leave_out(self, member: _Member, error: Exception) -> None:
        new, wait_for = member.reason is None, member.wait
        member.leave_out(error)
        what = "is left out" if new else "is still left out"
        left = sum(m.reason is None for m in self._members)
        log.warning(
            "reward %r: %s %s: %s; %d of %d servers are left%s, next try in %.0f s",
            self.name, member.server.url, what, member.reason, left, len(self._members),
            "" if left else " and the run waits", wait_for,
        )  # fmt: skip

    def _nobody(self) -> str:
        said = ", ".join(f"{m.server.url}: {m.reason}" for m in self._members)
        return f"no server is left ({said}); {self._start}, and go on with run.resume=true"


def _shown(value: object) -> str:
    return printable(json.dumps(value), 80)
