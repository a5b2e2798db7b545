"""`tiltflow reward-server`: rewards that runs on this or another machine ask for over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from urllib.parse import quote

from rich.console import Console

from tiltflow.core.interruption import interruptible
from tiltflow.rewards.remote.limits import Limits
from tiltflow.setup.build import device_of
from tiltflow.setup.manifest import rewards_fingerprints
from tiltflow.tasks.evaluate import load_rewards


def serve(
    rewards: Mapping[str, str | None],
    host: str,
    port: int,
    device: str,
    batch: int,
    limits: Limits,
    console: Console,
) -> None:
    """Loads the rewards (names, each with the path of its weights or None) and serves them until
    a signal; requests that are being answered then have half a minute to end.

    Raises:
        ValueError: if `host` is not the loopback and there is no token, the port is taken, the
            optional extra `server` is not installed, or a reward does not load.
    """
    from tiltflow.rewards.remote.server import Scorer, make_app, token_for

    try:
        from tiltflow.rewards.remote.gate import make_server
    except ImportError as error:
        raise ValueError(
            f"a reward server needs {error.name} (pip install 'tiltflow[server]')"
        ) from error
    token = token_for(host)
    sockets = bound(host, port)
    digests = [rewards_fingerprints({name: path}) for name, path in rewards.items()]
    loaded = load_rewards(rewards, device)  # one of one's own may have another name than its place
    files = {reward.name: of for reward, of in zip(loaded, digests, strict=True)}
    scorer = Scorer(loaded, device_of(device), batch, limits, files)
    server = make_server(make_app(scorer, token, limits), limits)
    place = f"[{host}]" if ":" in host else host
    for name in scorer.rewards:
        address = f"remote:http://{place}:{port}/{quote(name, safe=':')}"
        console.print(address, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{'with' if token else 'no'} token, at most {limits.body // 2**20} MiB a request and "
        f"{limits.image_pixels // 2**20} megapixels an image; stop with Ctrl-C"
    )
    with interruptible():
        server.run(sockets=sockets)
    console.print("stopped")


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address of the host. They do not listen yet: a client that comes while the
    rewards load is told that nobody is there, and waits.

    Raises:
        ValueError: if the host is unknown or the port taken.
    """
    sockets = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            made = socket.socket(family, kind, protocol)
            sockets.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
    except (OSError, UnicodeError) as error:
        for made in sockets:
            made.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--host {host} --port {port}: {reason.lower()}") from error
    return sockets
