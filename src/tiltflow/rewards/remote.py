"""A reward that runs elsewhere, behind a reward server (`tiltflow reward-server`).

A server that is away pauses the run, which goes on with the same images when it is back. A server
that answers wrongly is an error. Neither is ever a score.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import torch
from torch import Tensor

from tiltflow.interruption import pause
from tiltflow.paths import nearest
from tiltflow.rewards.base import REMOTE, Metadata
from tiltflow.rewards.wire import (
    ANSWER_LIMIT,
    REQUEST_IMAGES,
    REQUEST_PIXELS,
    TOKEN_VARIABLE,
    decode_scores,
    encode_batch,
    excerpt,
)

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second attempt, doubled before each further one up to the longest."""
AWAY_STATUS = (502, 503, 504)
"""What proxies, and servers that are starting or full, answer in place of a reward."""


class Away(Exception):
    """Nobody answers at the address, for now."""


class Fault(Exception):
    """Somebody answers, but not as a reward server does; another attempt may help."""


@dataclass(frozen=True)
class Settings:
    """How patient a client is.

    An attempt may take `timeout` seconds in all. `retries` more follow one that failed in spite
    of a server at the address. While there is none, the client waits, for at most `patience`
    seconds (None: without end). A request holds at most `batch` images.

    Raises:
        ValueError: if a value makes no sense.
    """

    timeout: float = 120.0
    retries: int = 3
    patience: float | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(f"option {option.name} is {value!r}, but it must be a number")
        if not self.timeout > 0:
            raise ValueError(f"option timeout is {self.timeout}, but it must be above 0 seconds")
        if not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"option retries is {self.retries!r}, but it must be 0, 1, 2, …")
        if self.patience is not None and not self.patience >= 0:
            raise ValueError(f"option patience is {self.patience}, but it must be 0 s or more")
        if not isinstance(self.batch, int) or not 1 <= self.batch <= REQUEST_IMAGES:
            raise ValueError(f"option batch is {self.batch!r}; it is 1 to {REQUEST_IMAGES} images")


class RemoteReward:
    """The reward NAME of the server at `remote:http[s]://HOST[:PORT]/NAME`; not differentiable.

    Images are rounded to eight bits on their way. The token, where the server asks for one, is
    read from the environment variable TILTFLOW_REWARD_TOKEN. Redirects and the environment's
    proxies are not followed.

    Raises:
        ValueError: if the address is none, no server answers there within `timeout` seconds, or
            it has no reward of that name; each call, if the server answers wrongly, refuses, or
            stays away for longer than `patience`.
        Stopped: by a call, if the run is asked to stop while it waits for the server.
    """

    differentiable = False
    domain = "images"
    elsewhere = True

    def __init__(self, address: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.url = address.removeprefix(REMOTE)
        parts = urlsplit(self.url)
        base, _, last = parts.path.rpartition("/")
        self.name = unquote(last)
        if parts.scheme not in ("http", "https") or not parts.hostname or not self.name:
            raise ValueError(
                f"{address!r} is no address of a remote reward: write {REMOTE}http://HOST:PORT/NAME"
            )
        if parts.username or parts.query or parts.fragment:
            raise ValueError(
                f"the address of remote reward {self.name!r} is to be host, port and name alone; "
                f"a token belongs into the environment variable {TOKEN_VARIABLE}"
            )
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host: tuple[str, int | None] = (parts.hostname, parts.port)
        self._base = base
        self._find()

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        height, width = images.shape[-2:]
        size = max(1, min(self.settings.batch, REQUEST_PIXELS // (height * width)))
        scores = []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            scores.append(self._score(images[rows], prompts[rows], metadata[rows]))
        return torch.cat(scores).to(images.device)

    def _find(self) -> None:
        """Checks that the server is there and has this reward."""

        def read(body: bytes) -> object:
            try:
                found = json.loads(body)["rewards"]
                return sorted(found)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"answered as no reward server does: {excerpt(body)}") from None

        ask = functools.partial(self._exchange, "GET", "health", None, read)
        names = self._insist(ask, self.settings.timeout)
        if self.name not in names:
            hint = nearest(self.name, names)
            raise ValueError(f"the server at {self.url} has no reward {self.name!r}{hint}")

    def _score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        body = encode_batch(images, prompts, metadata)
        read = functools.partial(decode_scores, count=len(images))
        path = quote(self.name, safe="")
        ask = functools.partial(self._exchange, "POST", path, body, read)
        scores: Tensor = self._insist(ask, self.settings.patience)
        return scores

    def _insist(self, ask: Callable[[], Any], patience: float | None) -> Any:
        """`ask` until it succeeds: waits for a server that is away, retries one that fails."""
        faults, wait, began, away = 0, FIRST_WAIT, time.monotonic(), False
        while True:
            try:
                answer = ask()
            except Away as error:
                waited = time.monotonic() - began
                if patience is not None and waited >= patience:
                    raise ValueError(
                        f"{self.url}: {error} for {waited:.0f} s; start it with "
                        f"tiltflow reward-server {self.name}, and go on with run.resume=true"
                    ) from error
                log.warning("%s: %s; the run waits, next try in %.0f s", self.url, error, wait)
                away = True
                if patience is not None:
                    wait = min(wait, max(patience - waited, 0.05))
            except Fault as error:
                faults += 1
                if faults > self.settings.retries:
                    times = "" if faults == 1 else f" ({faults} attempts)"
                    raise ValueError(f"{self.url} {error}{times}") from error
                log.warning("%s %s; next try in %.0f s", self.url, error, wait)
            else:
                if away:
                    log.warning("%s: the server is back, the run goes on", self.url)
                return answer
            pause(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _exchange(
        self, method: str, path: str, body: bytes | None, read: Callable[[bytes], Any]
    ) -> Any:
        """One request and what `read` makes of its answer.

        Raises:
            Away, Fault: see there.
            ValueError: if the server refuses, or `read` does: a further attempt is of no use.
        """
        connection = self._connect()
        try:
            with _deadline(connection, self.settings.timeout) as expired:
                try:
                    connection.request(method, f"{self._base}/{path}", body, self._headers())
                    response = connection.getresponse()
                    answer = _body(response)
                except (OSError, HTTPException) as error:
                    raise Fault(self._complaint(error, expired.is_set())) from error
                if expired.is_set():
                    raise Fault(self._complaint(TimeoutError(), True))
        finally:
            connection.close()
        try:
            _check_status(response, answer)
            return read(answer)
        except ValueError as error:
            raise ValueError(f"{self.url} {error}") from error

    def _connect(self) -> HTTPConnection:
        host, port = self._host
        connection = self._kind(host, port, timeout=self.settings.timeout)
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise ValueError(f"{self.url}: no secure connection ({error.reason})") from error
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise Away(f"no server answers ({reason.lower()})") from error
        return connection

    def _headers(self) -> dict[str, str]:
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        return headers | ({"Authorization": f"Bearer {token}"} if token else {})

    def _complaint(self, error: Exception, expired: bool) -> str:
        if expired or isinstance(error, TimeoutError):
            return f"gave no answer in {self.settings.timeout:g} s"
        if isinstance(error, IncompleteRead):
            announced = len(error.partial) + (error.expected or 0)
            return f"announced {announced} bytes and sent {len(error.partial)}"
        return f"broke off without an answer ({type(error).__name__})"


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


def _check_status(response: HTTPResponse, body: bytes) -> None:
    """Passes a 200.

    Raises:
        Away, Fault, ValueError: as the status says that waiting, another attempt or neither helps.
    """
    status = response.status
    if status == 200:
        return
    try:
        said = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        said = excerpt(body)
    if status in AWAY_STATUS:
        raise Away(f"the server is not ready (status {status})")
    if status >= 500:
        raise Fault(f"failed: {said}")
    if status in (401, 403):
        raise ValueError(f"refused the token: {said}; set {TOKEN_VARIABLE} to the server's")
    if status in (413, 422):
        raise ValueError(f"refused the batch: {said}")
    raise ValueError(f"answered with status {status}: {said}")
