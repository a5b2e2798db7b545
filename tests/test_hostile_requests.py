"""Hostile requests to our reward server: each is refused in a sentence, and it serves on."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiltflow.cli import main as cli
from tiltflow.rewards import load_reward
from tiltflow.rewards.remote import wire
from tiltflow.rewards.remote.limits import BODY_LIMIT

pytest.importorskip("uvicorn")

ROOT = Path(__file__).parents[1]
TOKEN = "the-token-of-this-test"
NAME = "reward_servers:mean"
HOST, BEARER = b"Host: localhost\r\n", b"Authorization: Bearer %s\r\n" % TOKEN.encode()
KIND = b"Content-Type: application/json\r\n"
KNOWN = HOST + BEARER + KIND
POST = b"POST /%s HTTP/1.1\r\n" % NAME.encode()
GIB = 2**30


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen
    port: int
    said: Path

    def peak(self) -> int:
        """The most main memory that it has had, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, sent: bytes, wait: float = 10.0) -> tuple[int, dict]:
        """The status and the JSON that one request is answered with."""
        with self.connect() as connection:
            connection.settimeout(wait)
            return answer_of(connection, sent)


def answer_of(connection: socket.socket, sent: bytes) -> tuple[int, dict]:
    with suppress(OSError):  # it has heard enough, and has answered
        connection.sendall(sent)
    said = b""
    while piece := connection.recv(65536):
        said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), said[:300]
    return int(head.split()[1]), json.loads(body)


def started(folder: Path, *options: str) -> Served:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, wire.TOKEN_VARIABLE: TOKEN}
    command = [sys.executable, "-m", "tiltflow", "reward-server", NAME, "--port", str(port)]
    said = folder / "said.txt"
    with said.open("w") as file:
        process = subprocess.Popen(
            [*command, "--device", "cpu", *options], env=environment, stdout=file, stderr=file
        )
    served = Served(process, port, said)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, said.read_text()
        try:
            served.connect().close()
        except OSError:
            time.sleep(0.1)
        else:
            return served
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = started(
        tmp_path_factory.mktemp("server"), "--header-timeout", "1", "--body-timeout", "2"
    )
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)


def serves_on(served: Served, within: float = 3.0) -> None:
    """A client is answered, soon and rightly, and the server has never taken more than a GB."""
    began = time.monotonic()
    reward = load_reward(f"remote:http://127.0.0.1:{served.port}/{NAME}", options={"retries": 0})
    images = torch.full((2, 3, 8, 8), 0.2)
    assert reward(images, ["a", "b"], [{}, {}]).tolist() == pytest.approx([0.2, 0.2])
    assert time.monotonic() - began < within
    assert served.peak() < GIB
    assert "Traceback" not in served.said.read_text()


# --- what is sent -------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    whole = kind + data
    return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(*chunks: bytes) -> str:
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def plain(side: int, width: int | None = None) -> str:
    """A black image, which a few kilobytes hold whatever its size."""
    buffer = io.BytesIO()
    Image.new("RGB", (width or side, side)).save(buffer, format="PNG", compress_level=9)
    return base64.b64encode(buffer.getvalue()).decode()


def post(body: bytes, more: bytes = b"") -> bytes:
    return POST + KNOWN + more + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def batch(images: list, **changes: object) -> bytes:
    whole = {"images": images, "prompts": ["p"] * len(images), "metadata": [{}] * len(images)}
    return post(json.dumps(whole | changes).encode())


def get(host: bytes, more: bytes = BEARER) -> bytes:
    return b"GET /health HTTP/1.1\r\n" + host + more + b"\r\n"


SMALL = plain(4)
END = chunk(b"IEND", b"")
TEXTS = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(b" " * 2**20)) for i in range(60))
DATA = chunk(b"IDAT", zlib.compress(b"\0" * (4 * 13)))
HUGE = b'{"images": [], "prompts": [], "metadata": [' + b"{}," * (20 * 2**20) + b"{}]}"

HOSTILE: dict[str, tuple[bytes, int]] = {
    "noise": (bytes(range(256)) * 4 + b"\r\n\r\n", 400),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + b"\0" * 99 + b"\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "no Host": (get(b""), 400),
    "two Hosts": (get(HOST + HOST), 400),
    "Host without end": (get(b"Host: [::1\r\n"), 400),
    "Host of two words": (get(b"Host: local host\r\n"), 400),
    "Host with a path": (get(b"Host: localhost/..\r\n"), 400),
    "Host with a user": (get(b"Host: a@localhost\r\n"), 400),
    "Host with an odd port": (get(b"Host: localhost:99999999\r\n"), 400),
    "Host of odd bytes": (get(b"Host: \xff\xfe\r\n"), 400),
    "Host of nothing": (get(b"Host: \r\n"), 400),
    "no token": (get(HOST, b""), 401),
    "another token": (get(HOST, b"Authorization: Bearer another-token-of-a-test\r\n"), 401),
    "a long token": (get(HOST, b"Authorization: Bearer %s\r\n" % (b"x" * 9000)), 401),
    "a token of odd bytes": (get(HOST, b"Authorization: Bearer \xff\r\n"), 401),
    "two tokens": (get(HOST, BEARER + b"Authorization: Bearer x\r\n"), 401),
    "a password": (get(HOST, b"Authorization: Basic dTpw\r\n"), 401),
    "no token and a body to come": (POST + HOST + KIND + b"Content-Length: 999999\r\n\r\n", 401),
    "a megabyte of header": (get(HOST, b"A: %s\r\n" % (b"x" * 2**20)), 400),
    "ten thousand headers": (get(HOST, b"A: b\r\n" * 10_000), 401),
    "headers without end": (b"GET /health HTTP/1.1\r\nHost: loc", 408),
    "a body that does not come": (POST + KNOWN + b"Content-Length: 9\r\n\r\n", 408),
    "half a body": (POST + KNOWN + b"Content-Length: 9\r\n\r\n{", 408),
    "a length below 0": (POST + KNOWN + b"Content-Length: -1\r\n\r\n", 400),
    "two lengths": (POST + KNOWN + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "a length beyond the limit": (POST + KNOWN + b"Content-Length: 99999999999\r\n\r\n", 413),
    "a body beyond the limit": (
        POST + KNOWN + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"800000\r\n" + b" " * 2**23 + b"\r\n") * 9, 413,
    ),
    "a chunk of no size": (POST + KNOWN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "text": (POST + HOST + BEARER + b"Content-Type: text/plain\r\nContent-Length: 0\r\n\r\n", 415),
    "packed": (post(b"x", b"Content-Encoding: gzip\r\n"), 415),
    "GET": (b"GET /%s HTTP/1.1\r\n%s\r\n" % (NAME.encode(), KNOWN), 405),
    "TRACE": (b"TRACE /health HTTP/1.1\r\n%s\r\n" % KNOWN, 405),
    "CONNECT": (b"CONNECT example.org:443 HTTP/1.1\r\n%s\r\n" % KNOWN, 404),
    "a path outwards": (b"GET /../../etc/passwd HTTP/1.1\r\n%s\r\n" % KNOWN, 404),
    "a coded path outwards": (b"GET /%%2e%%2e%%2fetc HTTP/1.1\r\n%s\r\n" % KNOWN, 404),
    "a path of odd bytes": (b"GET /%%ff%%00%%1b[2J HTTP/1.1\r\n%s\r\n" % KNOWN, 404),
    "a long path": (b"GET /%s HTTP/1.1\r\n%s\r\n" % (b"a" * 9000, KNOWN), 404),
    "another address": (b"GET http://example.org/x HTTP/1.1\r\n%s\r\n" % KNOWN, 404),
    "no JSON": (post(b"<html>"), 422),
    "no UTF-8": (post(b'{"images": ["\xff"]}'), 422),
    "nested": (post(b'{"metadata":' + b"[" * 100_000), 422),
    "a number without end": (post(b'{"metadata": [{"a": %s}]}' % (b"9" * 10**6)), 422),
    "a body of nothing": (post(HUGE), 422),
    "escapes": (post(b'{"\\u001b[2J": 1}'), 422),
    "a long prompt": (batch([SMALL], prompts=["x" * (5 * 2**20)]), 422),
    "no images": (batch([]), 422),
    "too many images": (batch([SMALL] * 257), 422),
    "images that are none": (batch([SMALL, 3]), 422),
    "more than was asked": (batch([SMALL], path="/etc/passwd"), 422),
    "a file": (batch([base64.b64encode(b"GIF89a" + b"\0" * 99).decode()]), 422),
    "a blank in base64": (batch([SMALL[:50] + "\n" + SMALL[50:]]), 422),
    "a header alone": (batch([png(header(4, 4))]), 422),
    "900 megapixels": (batch([png(header(30_000, 30_000), DATA, END)]), 422),
    "a picture of no width": (batch([png(header(0, 4), DATA, END)]), 422),
    "sixteen bits": (batch([png(header(4, 4, 16), DATA, END)]), 422),
    "a second header": (batch([png(header(4, 4), header(20_000, 20_000), DATA, END)]), 422),
    "a second, larger header": (batch([png(header(4, 4), header(4, 9000), DATA, END)]), 422),
    "two sizes": (batch([SMALL, plain(8)]), 422),
    "a hundred large images": (batch([png(header(4096, 4096), DATA, END)] * 100), 422),
    "texts that unpack to 60 MB": (batch([png(header(4, 4), TEXTS, DATA, END)] * 9), 200),
}  # fmt: skip


def test_there_are_forty() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_request_is_refused_in_a_sentence(how: str, served: Served) -> None:
    sent, expected = HOSTILE[how]
    began = time.monotonic()
    status, said = served.ask(sent)
    assert status == expected, said
    assert time.monotonic() - began < 8
    if status != 200:
        assert list(said) == ["error"] and said["error"].isprintable()
        assert len(said["error"]) < 1100 and TOKEN not in said["error"]
    assert served.peak() < GIB and served.process.poll() is None


def test_the_server_serves_on(served: Served) -> None:
    serves_on(served)


def test_headers_and_bodies_that_drip_are_ended(served: Served) -> None:
    for start in (b"GET /health HTTP/1.1\r\n", POST + KNOWN + b"Content-Length: 999\r\n\r\n"):
        with served.connect() as connection:
            connection.sendall(start)
            began = time.monotonic()
            connection.settimeout(0.1)
            said = b""
            while time.monotonic() - began < 6 and b"\r\n\r\n" not in said:
                try:
                    connection.sendall(b"a")
                    said += connection.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    break
            assert b" 408 " in said.splitlines()[0] and 0.9 < time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("count", "start"),
    [
        (16, b""), (200, b""), (200, b"GET /health HTTP/1.1\r\nHost:"),
        (200, b"POST / HTTP/1.1\r\n" + HOST),
    ],
)  # fmt: skip
def test_silent_connections_block_nobody(served: Served, count: int, start: bytes) -> None:
    with ExitStack() as open_ones:
        for _ in range(count):
            open_ones.enter_context(served.connect()).sendall(start)
        for _ in range(3):
            serves_on(served, within=2.0)


def test_bodies_that_stall_make_room(served: Served) -> None:
    """Of those who may ask, each address has its number; the one that waits longest goes."""
    with ExitStack() as open_ones:
        for _ in range(40):
            connection = open_ones.enter_context(served.connect())
            connection.sendall(POST + KNOWN + b"Content-Length: 60000000\r\n\r\n{")
        serves_on(served, within=4.0)


def eight_at_once(served: Served, sent: bytes) -> list[int]:
    """The statuses of eight requests."""
    with ThreadPoolExecutor(8) as pool:
        return [status for status, _ in pool.map(lambda _: served.ask(sent, 60), range(8))]


def test_eight_large_pictures_at_once(served: Served) -> None:
    """Sixteen megapixels each, in a body of some kilobytes."""
    sent = batch([plain(4096)])
    assert len(sent) < 100_000
    found = eight_at_once(served, sent)
    assert found == [200] * 8
    serves_on(served)


def test_large_bodies_at_once_have_room_one_after_another(served: Served) -> None:
    head = b"".join([POST, KNOWN, b"Content-Length: %d\r\n\r\n" % BODY_LIMIT])
    sent = head + b"[" + b" " * (BODY_LIMIT - 1)
    found = eight_at_once(served, sent)
    assert set(found) <= {422, 408} and 422 in found
    serves_on(served)


def test_a_client_hears_that_its_token_is_wrong_though_it_was_still_sending(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = load_reward(f"remote:http://127.0.0.1:{served.port}/{NAME}", options={"retries": 0})
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "another-token-of-this-test")
    images = torch.rand(8, 3, 512, 512)
    with pytest.raises(ValueError, match="refused the token: the token is missing or wrong"):
        reward(images, ["p"] * 8, [{}] * 8)


def test_the_limits_are_options_with_stated_defaults() -> None:
    said = " ".join(CliRunner().invoke(cli.app, ["reward-server", "--help"]).output.split())
    for option, default in {
        "header-timeout": "10.0", "body-timeout": "60.0", "connections": "64", "per-address": "16",
        "max-body": "64", "max-image": "16", "max-images": "64",
    }.items():  # fmt: skip
        assert re.search(rf"--{option} .{{0,99}}default: {default}\b", said), option


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltflow.tasks.reward_server import bound

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
            bound("127.0.0.1", port)
    with pytest.raises(ValueError, match="--host no.such.host.invalid"):
        bound("no.such.host.invalid", 8000)


def test_a_signal_ends_it_in_good_order(served: Served) -> None:
    """The last test of this server."""
    with served.connect() as silent, served.connect():
        silent.sendall(b"GET /hea")
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=30) == 0
    assert time.monotonic() - began < 10
    assert served.said.read_text().splitlines()[-1] == "stopped"
