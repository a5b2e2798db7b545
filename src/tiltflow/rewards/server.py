"""The reward server's application: rewards over HTTP, as `rewards/wire.py` says.

Needs the optional extra `server`, so it is imported by none but the command that serves.
"""

import hmac
import ipaddress
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tiltflow.paths import nearest
from tiltflow.rewards.base import Reward, checked
from tiltflow.rewards.wire import BODY_LIMIT, TOKEN_VARIABLE, decode_batch

log = logging.getLogger(__name__)

SHORTEST_TOKEN = 16


class Refusal(Exception):
    """A request that is not served: an HTTP status and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Scorer:
    """Rewards by name, one request at a time: they share a device, and models are not all safe
    to call from two threads. `batch` images go through a reward at once."""

    def __init__(self, rewards: Sequence[Reward], device: str | torch.device, batch: int) -> None:
        self.rewards = {reward.name: reward for reward in rewards}
        if not rewards or len(self.rewards) < len(rewards):
            raise ValueError("a reward server needs one or more rewards of different names")
        for reward in rewards:
            if getattr(reward, "domain", "images") != "images":
                raise ValueError(f"reward {reward.name!r} scores points; only images can be served")
        if batch < 1:
            raise ValueError(f"the batch of a reward server must be 1 or more, got {batch}")
        self.device, self.batch = device, batch
        self._one_at_a_time = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """The answer to /health. Scores come without gradients, whatever the reward could do."""
        return {"rewards": {name: {"differentiable": False} for name in self.rewards}}

    def score(self, name: str, body: bytes) -> dict[str, Any]:
        """The answer to a request's body.

        Raises:
            Refusal: 404 if there is no such reward; 422 if the request is none or the reward
                refuses it (or gives what is no score); 500 if the reward fails.
        """
        if name not in self.rewards:
            raise Refusal(404, f"there is no reward {name!r}{nearest(name, list(self.rewards))}")
        try:
            images, prompts, metadata = decode_batch(body)
            parts = []
            with self._one_at_a_time, torch.no_grad():
                for start in range(0, len(images), self.batch):
                    rows = slice(start, start + self.batch)
                    part = images[rows].to(self.device)
                    scored = checked(self.rewards[name], part, prompts[rows], metadata[rows])
                    parts.append(scored.cpu())
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        except Exception as error:  # whatever a reward does, the server serves on and says so
            log.exception("reward %r failed", name)
            raise Refusal(500, f"reward {name!r} raised {type(error).__name__}: {error}") from error
        return {"scores": torch.cat(parts).tolist()}


def make_app(scorer: Scorer, token: str | None) -> FastAPI:
    """The application. With a `token`, every request must bear it; without, only requests that
    are addressed to the loopback are answered, so that no web page can reach the server by giving
    its own name this machine's address.
    """

    def admit(request: Request) -> None:
        _admit(request, token)

    app = FastAPI(dependencies=[Depends(admit)], openapi_url=None)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"error": str(refusal)}, refusal.status)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return scorer.describe()

    @app.post("/{name}")
    async def score(name: str, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refusal(415, "a request for scores is application/json")
        body = await _limited(request)
        return await run_in_threadpool(scorer.score, name, body)

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
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} is open to other machines, which needs a token: set {TOKEN_VARIABLE} "
            "here and where the run is"
        )
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii()):
        raise ValueError(f"{TOKEN_VARIABLE} must have {SHORTEST_TOKEN} ASCII characters or more")
    return token


def _admit(request: Request, token: str | None) -> None:
    if token is None:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if host is None or not is_loopback(host):
            raise Refusal(403, f"this server answers on the loopback only, not to {host!r}")
        return
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refusal(401, "the token is missing or wrong")


async def _limited(request: Request) -> bytes:
    """The body of a request, refused as soon as it is known to be beyond the limit."""
    announced = request.headers.get("content-length", "0")
    too_long = Refusal(413, f"a request has at most {BODY_LIMIT} bytes; send fewer images at once")
    if announced.isdigit() and int(announced) > BODY_LIMIT:
        raise too_long
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_LIMIT:
            raise too_long
    return bytes(body)
