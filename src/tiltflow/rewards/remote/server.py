"""The reward server's application: rewards over HTTP, as `rewards/wire.py` says.

Plain ASGI: two paths need no framework, and what is read, when, and by whom is in sight here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from tiltflow.core.background import Background
from tiltflow.core.paths import nearest
from tiltflow.core.sentences import printable
from tiltflow.models.medium import IMAGES
from tiltflow.rewards.base import Reward, RewardFailed, checked, medium_of
from tiltflow.rewards.files import revisions
from tiltflow.rewards.purity import Examined
from tiltflow.rewards.remote.limits import IMAGE_PIXELS, Limits
from tiltflow.rewards.remote.wire import TOKEN_VARIABLE, given_token, read_batch

log = logging.getLogger(__name__)

SHORTEST_TOKEN = 16
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(?::[0-9]{1,5})?")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Refusal(Exception):
    """A request that is not served: an HTTP status and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Scorer:
    """Rewards by name, one request at a time: they share a device, and models are not all safe
    to call from two threads. `batch` images go through a reward at once, fewer where they have
    more pixels than one image may have. `files` are the digests, by reward, of what each is made
    of; they and the versions of packages are its contents, which every answer names."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        device: str | torch.device,
        batch: int,
        limits: Limits | None = None,
        files: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.rewards = {reward.name: reward for reward in rewards}
        if not rewards or len(self.rewards) < len(rewards):
            raise ValueError("a reward server needs one or more rewards of different names")
        for reward in rewards:
            if (scored := medium_of(reward).name) != IMAGES.name:
                raise ValueError(
                    f"reward {reward.name!r} scores {scored}; only images can be served"
                )
        if batch < 1:
            raise ValueError(f"the batch of a reward server must be 1 or more, got {batch}")
        self.device, self.batch = device, batch
        self.limits = limits or Limits()
        self.made_of = made_of(torch.device(device))
        self.facts = {name: self._facts(name, (files or {}).get(name, {})) for name in self.rewards}
        self._one_at_a_time = threading.Lock()
        self._examined = Examined()

    def describe(self) -> dict[str, Any]:
        """The answer to /health. Scores come without gradients, whatever the reward could do."""
        return {"rewards": self.facts, "made_of": self.made_of}

    def _facts(self, name: str, files: Mapping[str, str]) -> dict[str, object]:
        """What /health says of a reward. The device is no part of its contents: it changes the last
        bits alone."""
        facts: dict[str, object] = {"files": dict(files)} if files else {}
        if name in (revised := revisions([name])):
            facts["revision"] = revised[name]
        packages = {key: value for key, value in self.made_of.items() if key != "device"}
        content = json.dumps([name, facts, packages], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return {"differentiable": False, **facts, "contents": digest}

    def check(self, name: str) -> None:
        """Passes the name of a reward.

        Raises:
            Refusal: 404.
        """
        if name not in self.rewards:
            hint = nearest(name, list(self.rewards)) if len(name) < 200 else ""
            raise Refusal(404, f"there is no reward {name[:200]!r}{hint}")

    def score(self, name: str, body: bytes | bytearray) -> dict[str, Any]:
        """The answer to a request's body, which is read, and its images decoded, in its turn only.

        Raises:
            Refusal: 404 if there is no such reward; 422 if the request is none or the reward
                refuses it (or gives what is no score); 500 if the reward fails.
        """
        self.check(name)
        parts = []
        try:
            with self._one_at_a_time, torch.no_grad():
                batch = read_batch(body, self.limits.image_pixels, self.limits.request_pixels)
                if isinstance(body, bytearray):
                    body.clear()  # the batch has its text; errors and calls still refer to it
                size = min(self.batch, max(1, IMAGE_PIXELS // (batch.width * batch.height)))
                for start in range(0, len(batch.prompts), size):
                    rows = slice(start, start + size)
                    images = batch.images(rows).to(self.device)
                    about = batch.prompts[rows], batch.metadata[rows]
                    scores = checked(self.rewards[name], images, *about)
                    self._examined.look(self.rewards[name], images, *about, scores)
                    parts.append(scores.cpu())
        except RewardFailed as error:  # its own fault, which another attempt may not meet
            log.exception("reward %r failed", name)
            raise Refusal(500, str(error)) from error
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        except Exception as error:  # whatever a reward does, the server serves on and says so
            log.exception("reward %r failed", name)
            raise Refusal(500, f"reward {name!r} raised {type(error).__name__}: {error}") from error
        return {"scores": torch.cat(parts).tolist(), "contents": self.facts[name]["contents"]}


def made_of(device: torch.device) -> dict[str, str]:
    """What a score's last bits depend on beside the reward: versions, and the kind of device."""
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    name = named(device) if named is not None else kind
    packages = {name: version(name) for name in ("tiltflow", "torch", "transformers")}
    return packages | {"device": f"{device.type} {name}".strip()}


class Bodies:
    """Room for the bodies of requests: `most` bytes of all together, and where that is not enough,
    the oldest request alone goes on, so that none waits for ever."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[object, int] = {}  # by request, in the order in which they came
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[object]:
        """A key for `grow`; the room is given back at the end."""
        key = object()
        self._held[key] = 0
        try:
            yield key
        finally:
            del self._held[key]
            async with self._changed:
                self._changed.notify_all()

    async def grow(self, key: object, count: int) -> None:
        """Waits until there is room for `count` more bytes of a request."""

        def room() -> bool:
            return sum(self._held.values()) + count <= self._most or next(iter(self._held)) is key

        async with self._changed:
            await self._changed.wait_for(room)
            self._held[key] += count


@dataclass
class Caller:
    """Who asks, where there is no gate that keeps book of connections."""

    admitted: bool = False
    busy: bool = False


def make_app(scorer: Scorer, token: str | None, limits: Limits | None = None) -> App:
    """The application. With a `token`, every request must bear it; without, only requests that
    are addressed to the loopback are answered, so that no web page can reach the server by giving
    its own name this machine's address.
    """
    limits = limits or Limits()
    bodies, work = Bodies(limits.body), Background("scoring")

    async def answer(scope: Message, receive: Receive) -> dict[str, Any]:
        caller = scope.get("state", {}).get("connection", Caller())
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        _admit(headers, token)
        caller.admitted = True
        method, name = scope["method"], scope["path"].removeprefix("/")
        if name == "health":
            _check_method(method, ("GET", "HEAD"))
            return scorer.describe()
        scorer.check(name)
        _check_method(method, ("POST",))
        _check_headers(headers, limits.body)
        async with bodies.request() as key:
            body = await _read(receive, limits, bodies, key, caller)
            caller.busy = True
            # Shielded: a call that has begun cannot be taken back.
            scored = asyncio.wrap_future(work.call(_score_for, caller, scorer, name, body))
            return await asyncio.shield(scored)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            status, said = 200, await answer(scope, receive)
        except Refusal as refusal:
            status, said = refusal.status, {"error": printable(str(refusal), 1000)}
        except asyncio.CancelledError:
            status, said = 503, {"error": "the server is stopping"}
        body = json.dumps(said).encode()
        kind, length = (b"content-type", b"application/json"), str(len(body)).encode()
        headers = [kind, (b"content-length", length)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(host: str) -> str | None:
    """The token that the environment gives, or None, which is enough on the loopback.

    Raises:
        ValueError: if there is none and `host` is open to other machines, or it is too short.
    """
    token = given_token()
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} is open to other machines, which needs a token: set {TOKEN_VARIABLE} "
            "here and where the run is"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ValueError(f"{TOKEN_VARIABLE} must have {SHORTEST_TOKEN} ASCII characters or more")
    return token


def _admit(headers: Iterable[tuple[bytes, bytes]], token: str | None) -> None:
    """Who asks, from the headers alone: before this, nothing else of a request is looked at."""
    hosts = [value for key, value in headers if key == b"host"]
    named = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if named is None:
        raise Refusal(400, "the Host header is missing or malformed")
    if token is None:
        host = named[1].decode().strip("[]")
        if not is_loopback(host):
            raise Refusal(403, f"this server answers on the loopback only, not to {host!r}")
        return
    given = [value for key, value in headers if key == b"authorization"]
    if len(given) != 1 or not hmac.compare_digest(given[0], f"Bearer {token}".encode()):
        raise Refusal(401, "the token is missing or wrong")


def _check_method(method: str, allowed: Sequence[str]) -> None:
    if method not in allowed:
        raise Refusal(405, f"the method here is {' or '.join(allowed)}")


def _check_headers(headers: Iterable[tuple[bytes, bytes]], most: int) -> None:
    """What the headers say of the body: JSON, not packed, and not too long."""
    found = dict(headers)
    if found.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise Refusal(415, "a request for scores is application/json")
    if found.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "a request for scores is not compressed")
    announced = found.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > most:
        raise _too_long(most)


def _too_long(most: int) -> Refusal:
    return Refusal(413, f"a request has at most {most} bytes; send fewer images at once")


async def _read(
    receive: Receive, limits: Limits, bodies: Bodies, key: object, caller: Caller
) -> bytearray:
    """The body of a request, refused as soon as it is known to be beyond a limit."""
    body, left = bytearray(), limits.body_timeout
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        try:
            async with asyncio.timeout(min(left, limits.header_timeout)):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, "the body of the request did not come in time") from None
        left -= clock() - began  # without the time in which it is the server that has no room
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the request broke off")
        piece = message.get("body", b"")
        if len(body) + len(piece) > limits.body:
            raise _too_long(limits.body)
        caller.busy = True
        await bodies.grow(key, len(piece))
        caller.busy = False
        body += piece
        if not message.get("more_body", False):
            return body


def _score_for(caller: Any, scorer: Scorer, name: str, body: bytearray) -> dict[str, Any]:
    """Scores, unless whoever asked has gone while others had their turn."""
    transport = getattr(caller, "transport", None)
    try:
        if transport is not None and transport.is_closing():
            raise Refusal(400, "the request broke off")
        return scorer.score(name, body)
    finally:
        body.clear()
