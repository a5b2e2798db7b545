"""A reward that runs elsewhere, behind a reward server (`tiltflow reward-server`).

A server that is away pauses the run, which goes on with the same images when it is back. A server
that answers wrongly is an error. Neither is ever a score.

It speaks HTTP by the standard library. httpx2 has a time limit for each read and none for an answer
in all, follows `100 Continue` for as long as it is sent, and hides from its caller what a
`103 Early Hints` without an end was; so the limits below would have to be built around it as well.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from tiltflow.core.interruption import pause
from tiltflow.core.paths import nearest
from tiltflow.core.sentences import printable
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.remote.address import TOKEN_VARIABLE, Address, Settings
from tiltflow.rewards.remote.limits import BODY_LIMIT, REQUEST_PIXELS
from tiltflow.rewards.remote.wire import (
    ANSWER_LIMIT,
    decode_scores,
    encode_batch,
    excerpt,
    given_token,
    parse,
)

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second attempt, doubled before each further one up to the longest."""
AWAY_STATUS = (429, 502, 503, 504)
"""What proxies, and servers that are starting or full, answer in place of a reward."""
READ_LIMIT = 2 * ANSWER_LIMIT
"""Bytes that are read of an answer in all, headers and the marks of chunks among them."""


class Away(Exception):
    """Nobody answers at the address, for now."""


class Fault(Exception):
    """Somebody answers, but not as a reward server does; another attempt may help."""


class Client:
    """Asks the server at `address`, within the bounds above.

    `start` says how to start one that is away; `token` gives what it is to be shown, or None, from
    the environment `variable`.
    """

    def __init__(
        self,
        address: Address,
        settings: Settings,
        start: str,
        token: Callable[[], str | None],
        variable: str,
    ) -> None:
        self._address, self._settings, self.url = address, settings, address.url
        self._start, self._token, self._variable = start, token, variable

    def insist(self, ask: Callable[[], Any], patience: float | None) -> Any:
        """`ask` until it succeeds: waits for a server that is away, retries one that fails.

        (tenacity counts attempts of one kind: two kinds, of which only one is counted and the other
        has a time limit, take as many lines with it.)
        """
        faults, wait, began, away = 0, FIRST_WAIT, time.monotonic(), False
        while True:
            try:
                answer = ask()
            except Away as error:
                waited = time.monotonic() - began
                if patience is not None and waited >= patience:
                    raise ValueError(
                        f"{self.url}: {error} for {waited:.0f} s; {self._start}, and "
                        "go on with run.resume=true"
                    ) from error
                log.warning("%s: %s; the run waits, next try in %.0f s", self.url, error, wait)
                away = True
                if patience is not None:
                    wait = min(wait, max(patience - waited, 0.05))
            except Fault as error:
                faults += 1
                if faults > self._settings.retries:
                    times = "" if faults == 1 else f" ({faults} attempts)"
                    raise ValueError(f"{self.url} {error}{times}") from error
                log.warning("%s %s; next try in %.0f s", self.url, error, wait)
            else:
                if away:
                    log.warning("%s: the server is back, the run goes on", self.url)
                return answer
            pause(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def exchange(
        self, method: str, path: str, body: bytes | None, read: Callable[[bytes], Any]
    ) -> Any:
        """One request and what `read` makes of its answer.

        Raises:
            Away, Fault: see there.
            ValueError: if the server refuses, or `read` does: a further attempt is of no use.
        """
        token = self._token()
        headers = _headers(token)
        connection = self._connect()
        try:
            with _deadline(connection, self._settings.timeout) as expired:
                try:
                    # One that has heard enough answers and hangs up before it has the body.
                    with suppress(BrokenPipeError, ConnectionResetError):
                        connection.request(method, f"{self._address.base}/{path}", body, headers)
                    response = connection.getresponse()
                    answer = _body(response)
                except (OSError, HTTPException, ValueError) as error:  # ValueError: odd numbers
                    raise Fault(self._complaint(error, expired.is_set())) from error
                if expired.is_set():
                    raise Fault(self._complaint(TimeoutError(), True))
        finally:
            connection.close()
        if token is not None:  # what a server echoes would be in the log
            answer = answer.replace(token.encode(), b"[...]")
        try:
            _check_status(response, answer, self._variable)
            return read(answer)
        except ValueError as error:
            raise ValueError(f"{self.url} {error}") from error

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._address.secure else HTTPConnection
        connection = kind(self._address.host, self._address.port, timeout=self._settings.timeout)
        connection.response_class = _Answer
        try:
            connection.connect()
        except ssl.SSLEOFError as error:
            raise Fault("broke off before there was a secure connection") from error
        except ssl.SSLError as error:
            raise ValueError(f"{self.url}: no secure connection ({error.reason})") from error
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise Away(f"no server answers ({reason.lower()})") from error
        return connection

    def _complaint(self, error: Exception, expired: bool) -> str:
        if expired or isinstance(error, TimeoutError):
            return f"gave no answer in {self._settings.timeout:g} s"
        if isinstance(error, IncompleteRead):
            announced = len(error.partial) + (error.expected or 0)
            return f"announced {announced} bytes and sent {len(error.partial)}"
        return f"broke off without an answer ({type(error).__name__})"


class RemoteReward:
    """The reward NAME of the server at `remote:http[s]://HOST[:PORT]/NAME`; not differentiable.

    Images are rounded to eight bits on their way. The token, where the server asks for one, is
    read from the environment variable TILTFLOW_REWARD_TOKEN. Redirects and the environment's
    proxies are not followed.

    Raises:
        ValueError: if the address is none, no server answers there within `timeout` seconds, or
            it has no reward of that name; each call, if the server answers wrongly, refuses, stays
            away for longer than `patience`, or is one with other contents than at the start.
        Stopped: by a call, if the run is asked to stop while it waits for the server.
    """

    differentiable = False
    domain = "images"
    elsewhere = True

    def __init__(self, address: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        where = Address.of(address)
        self.name, self.url = where.name, where.url
        start = f"start it with tiltflow reward-server {self.name}"
        self._client = Client(where, self.settings, start, given_token, TOKEN_VARIABLE)
        try:
            self._find()
        except ValueError as error:
            raise ValueError(f"reward {self.name!r}: {error}") from error

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        scores = [
            self._score(body, count)
            for body, count in requests(images, prompts, metadata, self.settings.batch)
        ]
        return torch.cat(scores).to(images.device)

    def _find(self) -> None:
        """Checks that the server is there and has this reward, and what it is made of."""
        ask = functools.partial(self._client.exchange, "GET", "health", None, self._known)
        said = self._client.insist(ask, self.settings.timeout)
        self.contents, self.lasting = contents_of(self.name, said), lasting_of(said)

    def _known(self, body: bytes) -> dict[str, Any]:
        return read_health(body, self.name)

    def _score(self, body: bytes, count: int) -> Tensor:
        read = functools.partial(decode_scores, count=count, contents=self.contents)
        path = quote(self.name, safe="")
        ask = functools.partial(self._client.exchange, "POST", path, body, read)
        scores: Tensor = self._client.insist(ask, self.settings.patience)
        return scores


def read_health(body: bytes, name: str) -> dict[str, Any]:
    """What a server says of itself and of its reward `name`.

    Raises:
        ValueError: if it is no reward server's answer, or there is no such reward.
    """
    try:
        found = parse(body)
    except ValueError:
        found = None
    rewards = found.get("rewards") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(rewards, dict):
        raise ValueError(f"answered as no reward server does: {excerpt(body)}")
    if name not in rewards:
        hint = printable(nearest(name, list(rewards)))
        raise ValueError(f"has no reward {name!r}{hint}")
    facts = [part for part in (rewards[name], found.get("made_of")) if isinstance(part, dict)]
    return {key: value for part in facts for key, value in part.items()}


def contents_of(name: str, said: Mapping[str, Any]) -> object:
    """The contents of the reward `name` that a server names, which it then repeats with every
    answer; None, and a line in the log, of one that does not: a server of an earlier version."""
    if said.get("contents") is None:
        log.warning(
            "reward %r: its server does not say what the reward is made of (an earlier version?), "
            "so it would not be noticed if other code or weights went on in its place",
            name,
        )
    return said.get("contents")


def lasting_of(said: Mapping[str, Any]) -> object:
    """Of a reward's contents what does not change where packages are upgraded, as of a reward that
    computes here: a digest of its files and its revision. Of another program's server, which may
    say neither, the contents; None of one that names none."""
    if said.get("contents") is None or "tiltflow" not in said:
        return said.get("contents")
    facts = {key: said.get(key) for key in ("files", "revision")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def requests(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], batch: int
) -> Iterator[tuple[bytes, int]]:
    """The bodies of the requests for images (B, 3, H, W), in their order, each made when its turn
    comes, with how many images it has: at most `batch`, and as many as a server takes."""
    height, width = images.shape[-2:]
    size = max(1, min(batch, REQUEST_PIXELS // (height * width)))
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        yield from _bodies(images[rows], prompts[rows], metadata[rows])


def _bodies(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> Iterator[tuple[bytes, int]]:
    body = encode_batch(images, prompts, metadata)
    if len(body) <= BODY_LIMIT or len(images) == 1:
        yield body, len(images)
        return
    half = len(images) // 2
    for part in (slice(None, half), slice(half, None)):
        yield from _bodies(images[part], prompts[part], metadata[part])


def _headers(token: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})


class _Bounded(io.RawIOBase):
    """A socket's bytes, `READ_LIMIT` of them: headers, sizes of chunks and trailers included, on
    which the standard library's reader sets no bound together."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._left = raw, READ_LIMIT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._left <= 0:
            raise Fault(f"sent more than {READ_LIMIT} bytes, more than scores can take")
        count = self._raw.readinto(memoryview(buffer)[: self._left])
        self._left -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(HTTPResponse):
    """A response of which no more than `READ_LIMIT` bytes are ever read."""

    def __init__(self, sock: socket.socket, *more: Any, **named: Any) -> None:
        super().__init__(sock, *more, **named)
        self.fp: Any = io.BufferedReader(_Bounded(self.fp.detach()))


@contextmanager
def _deadline(connection: HTTPConnection, seconds: float) -> Iterator[threading.Event]:
    """Shuts the connection after `seconds` in all. A socket's own time-out starts again with
    every byte, so a server that trickles would hold the run for ever."""
    expired = threading.Event()
    sock = connection.sock

    def expire() -> None:
        expired.set()
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed in the meantime, which is all that was wanted
            return

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _body(response: HTTPResponse) -> bytes:
    """The whole body of an answer, of no more than `ANSWER_LIMIT` bytes."""
    if response.length is not None and response.length > ANSWER_LIMIT:
        raise Fault(f"announced {response.length} bytes, more than scores can take")
    if response.length is not None:
        return response.read()  # whole, or IncompleteRead
    body = response.read(ANSWER_LIMIT + 1)
    if len(body) > ANSWER_LIMIT:
        raise Fault(f"sent more than {ANSWER_LIMIT} bytes, more than scores can take")
    return body


def _check_status(response: HTTPResponse, body: bytes, variable: str) -> None:
    """Passes a 200.

    Raises:
        Away, Fault, ValueError: as the status says that waiting, another attempt or neither helps.
    """
    status, packed = response.status, response.headers.get("content-encoding", "identity")
    if packed.strip().lower() != "identity":  # never asked for, so never unpacked
        raise ValueError(f"answered in the encoding {printable(packed, 40)!r}, unasked")
    if status == 200:
        return
    if status in AWAY_STATUS:
        raise Away(f"the server is not ready (status {status})")
    said = _error(body)
    if status >= 500 or status == 408:
        raise Fault(f"failed: {said}")
    if 300 <= status < 400:
        raise ValueError(f"answered with status {status}, a redirect, which is not followed")
    if status in (401, 403):
        raise ValueError(f"refused the token: {said}; set {variable} to the server's")
    if status in (413, 422):
        raise ValueError(f"refused the batch: {said}")
    raise ValueError(f"answered with status {status}: {said}")


def _error(body: bytes) -> str:
    """What the server says went wrong, in one line that a terminal can be given."""
    try:
        answer = parse(body)
    except ValueError:
        answer = None
    said = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(said, dict):  # as OpenAI's servers say it
        said = said.get("message")
    return printable(said) if isinstance(said, str) else excerpt(body)
