"""Reward servers that misbehave, for the client's tests: plain sockets that say what they like."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).parents[1]


def mean(images: Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> Tensor:
    """A reward for real servers."""
    return images.mean((1, 2, 3))


def unhurried_mean(images: Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> Tensor:
    """A reward that takes a moment, so that several servers have work at a time."""
    time.sleep(0.05)
    return images.mean((1, 2, 3))


Reply = Callable[[socket.socket, bytes], None]
"""Answers one request, given its body; the connection is closed afterwards."""

HEALTH = b'{"rewards": {"mean": {"differentiable": false}}}'


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole answer, which announces `length` bytes, by default as many as it has."""
    announced = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), announced, body)


def says(answer: bytes) -> Reply:
    return lambda connection, body: connection.sendall(answer)


def trickles(connection: socket.socket, body: bytes) -> None:
    """A byte now and then, so that no single read ever takes long."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.05)


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """The first line and the body of a request."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    length = int(fields.get(b"content-length", b"0"))
    while len(body) < length:
        body += connection.recv(65536)
    return head.split(b"\r\n")[0], body


@contextmanager
def server(score: Reply, port: int = 0, health: Reply | None = None) -> Iterator[int]:
    """Serves on the loopback, a thread a connection; gives the port. Health is as it should be."""
    health = health or says(http(HEALTH))
    listener = socket.create_server(("127.0.0.1", port))
    listener.settimeout(0.02)
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                line, body = read_request(connection)
                (health if line.startswith(b"GET /health") else score)(connection, body)
            except OSError:  # the client has had enough
                return

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(None)
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        thread.join()
        listener.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def process(name: str, port: int, said: Path) -> subprocess.Popen[bytes]:
    """A real server of the reward `name`, in a process that may not listen yet."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    command = [sys.executable, "-m", "tiltflow", "reward-server", name, "--port", str(port)]
    with said.open("a") as file:
        return subprocess.Popen(
            [*command, "--device", "cpu"],
            env={**os.environ, "PYTHONPATH": paths}, stdout=file, stderr=file,
        )  # fmt: skip


def await_listening(served: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert served.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server did not start")
