"""Who may ask a desk, and what a browser may do with its answers.

Others on this machine, and pages of other origins in the same browser, can reach a port of the
loopback. A request is served if its Host names this desk (no DNS rebinding), if it bears the token
(a cookie that the printed address sets; SameSite keeps it from other sites, but not from other
ports of this host), and if the browser says that it comes from this page or from nowhere: the
header Sec-Fetch-Site, and for writes Origin, too.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiltflow.rewards.remote.server import is_loopback

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer."""


class Refused(Exception):
    """A request that is not served: an HTTP status and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """An application behind its guard. `host` is the address that it listens at."""

    def __init__(self, app: ASGIApp, host: str, port: int, token: str) -> None:
        self.app, self.host, self.token = app, host, token
        self.cookie = f"tiltflow_desk_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        entering = False
        try:
            entering = self._admit(Request(scope))
        except Refused as refused:
            answer = JSONResponse({"error": str(refused)}, refused.status, headers=HEADERS)
            await answer(scope, receive, send)
            return
        connection = scope.get("state", {}).get("connection")
        if connection is not None:  # the gate's: this one has shown that it may ask
            connection.admitted = connection.busy = True

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if entering:
                    kept = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                    headers.append("Set-Cookie", kept)
            await send(message)

        await self.app(scope, receive, send_guarded)

    def _admit(self, request: Request) -> bool:
        """Whether a request comes with the token in its address, which a cookie is to keep.

        Raises:
            Refused: if it is not to be served.
        """
        headers = request.headers
        self._check_host(headers)
        site = headers.get("sec-fetch-site", "none")
        entry = request.url.path == "/" and request.method == "GET"
        if site not in ("same-origin", "none") and not entry:
            raise Refused(403, "a page of another origin may not ask here")
        if request.method not in ("GET", "HEAD"):
            if headers.get("origin") != f"http://{headers['host']}":
                raise Refused(403, "a page of another origin may not write here")
            if headers.get("content-type", "").partition(";")[0] != "application/json":
                raise Refused(415, "what is written here is application/json")
        given = request.query_params.get("token") if entry else None
        if given is not None and self._is_token(given):
            return True
        if not self._is_token(self._kept(headers)):
            raise Refused(401, "open the address that the terminal printed, with its token")
        return False

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        try:
            name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
        except ValueError:
            name = None
        if name is None:
            raise Refused(400, "the Host header is missing or malformed")
        if name != self.host and not (is_loopback(name) and is_loopback(self.host)):
            raise Refused(403, "this desk is not called that")

    def _kept(self, headers: Headers) -> str:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return "" if morsel is None else morsel.value

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())
