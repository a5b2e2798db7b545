"""The desk as a server on this machine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tiltflow.core.interruption import interruptible
from tiltflow.core.paths import check_folder
from tiltflow.data.preferences import read_votes
from tiltflow.desk.sources import find_sources
from tiltflow.rewards.remote.limits import Limits
from tiltflow.tasks.reward_server import bound

LIMITS = Limits(connections=128, per_address=64)


def serve_desk(
    given: Sequence[Path], host: str, port: int, votes: Path | None, console: Console
) -> None:
    """Serves the page until a signal; prints its address, with a token, once. Votes go to `votes`,
    or to preferences.jsonl in the first folder.

    Raises:
        ValueError: if a path holds nothing for a desk, the port is taken, or the optional extra
            `server` is not installed.
    """
    find_sources(given)
    folder = given[0] if given[0].is_dir() else given[0].parent
    votes = votes or folder / "preferences.jsonl"
    check_folder("--votes", votes.parent)
    read_votes(votes)
    try:
        from tiltflow.desk.app import Desk, make_app
        from tiltflow.rewards.remote.gate import make_server
    except ImportError as error:
        raise ValueError(f"the desk needs {error.name} (pip install 'tiltflow[server]')") from error
    sockets = bound(host, port)
    port = sockets[0].getsockname()[1]
    token = secrets.token_urlsafe(24)
    server = make_server(make_app(Desk(given, votes), host, port, token), LIMITS)
    name = f"[{host}]" if ":" in host else host
    console.print(f"http://{name}:{port}/?token={token}", highlight=False, markup=False)
    console.print("open this address in a browser; stop with Ctrl-C")
    console.print(f"votes go to {votes}")
    with interruptible():
        server.run(sockets=sockets)
    console.print("stopped")
