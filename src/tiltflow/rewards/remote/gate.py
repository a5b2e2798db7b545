"""The reward server's gate: who may be connected, for how long, before anything is known of them.

uvicorn has no time limit for a request's headers and counts silent connections like others. Here a
connection that has not yet shown that it may ask (headers, Host, token) is on sufferance: it has
`header_timeout` seconds, and where there is no room for a newcomer, the oldest such connection
goes. However many sit there silently, one that asks at once gets through.

Needs the optional extra `server`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tiltflow.rewards.remote.limits import Limits

STALL = 1.0
"""Seconds without a byte of its body after which a request may have to make room."""
LINGER = 1.0
"""Seconds for which what a refused client still sends is read and thrown away, so that its kernel
does not drop the answer."""
LINGERING = 64
"""Refused connections that are read on at a time; further ones are cut off at once."""
GRACE = 30
"""Seconds that requests have to end when the server is asked to stop."""


class Gate:
    """The connections of a server, in the order in which they came."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connections: list[Connection] = []
        self.lingering = 0

    def enter(self, new: Connection) -> bool:
        """Whether there is room for one more, if need be in the place of one that does nothing."""
        for most, address in (
            (self.limits.per_address, new.address),
            (self.limits.connections, ""),
        ):
            peers = [c for c in self.connections if not address or c.address == address]
            if len(peers) >= most:
                idle = _idle(peers)
                if idle is None:
                    return False
                self.leave(idle)
                idle.transport.abort()
        self.connections.append(new)
        return True

    def leave(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)


def _idle(peers: list[Connection]) -> Connection | None:
    """The oldest that has shown nothing, else the one that has been sending nothing for longest."""
    unknown = [c for c in peers if not c.admitted]
    if unknown:
        return unknown[0]
    now = time.monotonic()
    stalled = [c for c in peers if not c.busy and now - c.heard > STALL]
    return min(stalled, key=lambda c: c.heard, default=None)


class Connection(H11Protocol):
    """One connection, for one request. The application sets `admitted` when it has seen who asks,
    and `busy` while it is the server that the client waits for."""

    def __init__(self, gate: Gate, **given: Any) -> None:
        super().__init__(**given)
        self.app_state = {**self.app_state, "connection": self}
        self.gate, self.address = gate, ""
        self.admitted, self.busy, self.refused = False, False, False
        self.heard = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else "?"
        if not self.gate.enter(self):
            self.refuse(503, "the server has as many connections as it takes; try again later")
            return
        late = partial(self.refuse, 408, "the headers of the request did not come in time")
        self._arm(self.gate.limits.header_timeout, late)

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        self.heard = time.monotonic()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.gate.leave(self)
        self.gate.lingering -= self.refused
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.abort()
            return
        self.refuse(400, "this is no valid HTTP request")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._arm(self.gate.limits.header_timeout, self.transport.abort)  # it may never read it

    def refuse(self, status: int, reason: str) -> None:
        """An answer without the application, and the end of the connection."""
        if self.refused or self.transport.is_closing():
            return
        self.refused = True
        self.gate.leave(self)
        self.gate.lingering += 1
        body = json.dumps({"error": reason}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        if self.gate.lingering > LINGERING:
            self.transport.abort()
        else:
            self._arm(LINGER, self.transport.abort)

    def _arm(self, seconds: float, action: Callable[[], object]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def make_server(app: Any, limits: Limits) -> uvicorn.Server:
    """A server for the application behind a gate; to be run with sockets of one's own."""
    config = uvicorn.Config(
        app,
        http=partial(Connection, Gate(limits)),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="error",  # every malformed request is a warning
        access_log=False,
        server_header=False,
        proxy_headers=False,
        headers=[("Connection", "close")],
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(config)
