"""`tiltflow reward-server`: rewards that runs on this or another machine ask for over HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from tiltflow.build import device_of
from tiltflow.commands.evaluate import load_rewards
from tiltflow.rewards.wire import BODY_LIMIT, IMAGE_PIXELS

AT_ONCE = 16
"""Connections at a time; further ones are told to wait (status 503)."""


def serve(
    rewards: Mapping[str, str | None],
    host: str,
    port: int,
    device: str,
    batch: int,
    console: Console,
) -> None:
    """Loads the rewards (names, each with the path of its weights or None) and serves them until
    interrupted.

    Raises:
        ValueError: if `host` is not the loopback and there is no token, the optional extra
            `server` is not installed, or a reward does not load.
    """
    try:
        import uvicorn

        from tiltflow.rewards.server import Scorer, make_app, token_for
    except ImportError as error:
        raise ValueError(
            f"a reward server needs {error.name} (pip install 'tiltflow[server]')"
        ) from error
    token = token_for(host)
    app = make_app(Scorer(load_rewards(rewards, device), device_of(device), batch), token)
    place = f"[{host}]" if ":" in host else host
    for name in rewards:
        console.print(f"remote:http://{place}:{port}/{name}", highlight=False, markup=False)
    console.print(
        f"{'with' if token else 'no'} token, at most {BODY_LIMIT // 2**20} MiB a request and "
        f"{IMAGE_PIXELS // 2**20} megapixels an image; stop with Ctrl-C"
    )
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=AT_ONCE,
    )
