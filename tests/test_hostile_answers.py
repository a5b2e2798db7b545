"""What a hostile server answers: one printable sentence, in bounded time and memory, no secret."""

from __future__ import annotations

import gzip
import logging
import re
import socket
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reward_servers import HEALTH, Reply, http, says, server, trickles

from tiltflow.cli.options import named_rewards
from tiltflow.config.load import load_config
from tiltflow.core.sentences import printable
from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.remote import client, wire
from tiltflow.rewards.remote.address import Address, refuse_secrets
from tiltflow.rewards.remote.client import RemoteReward, Settings

ESCAPE, BELL = b"\\u001b[2J", b"\\u0007"
OK = b"HTTP/1.1 200 OK\r\n"


def scores(text: bytes) -> Reply:
    return says(http(b'{"scores": [1, %s, 2]}' % text))


def endless(start: bytes, again: bytes) -> Reply:
    """Says something, and then something else for as long as anybody listens."""

    def reply(connection: socket.socket, body: bytes) -> None:
        connection.sendall(start)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            connection.sendall(again)

    return reply


def reset(said: bytes) -> Reply:
    """Breaks the connection off with a reset after it has said something."""

    def reply(connection: socket.socket, body: bytes) -> None:
        connection.sendall(said)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return reply


def silent(connection: socket.socket, body: bytes) -> None:
    time.sleep(0.6)


HOSTILE: dict[str, tuple[Reply, str]] = {
    "nested": (says(http(b"[" * 100_000)), "not JSON"),
    "scores nested": (scores(b"[" * 100_000 + b"]" * 100_000), "not JSON"),
    "objects nested": (says(http(b'{"scores":' * 50_000)), "not JSON"),
    "400 digits": (scores(b"9" * 400), r"not finite \(image 1\)"),
    "-400 digits": (scores(b"-" + b"9" * 400), r"not finite \(image 1\)"),
    "5000 digits": (scores(b"9" * 5000), "not JSON"),
    "nan": (scores(b"NaN"), "not finite"),
    "infinity": (scores(b"Infinity"), "not finite"),
    "-infinity": (scores(b"-Infinity"), "not finite"),
    "beyond fp32": (scores(b"1e39"), r"not finite \(image 1\)"),
    "text": (scores(b'"1"'), "'1' for a score"),
    "true": (scores(b"true"), "True for a score"),
    "null": (scores(b"null"), "None for a score"),
    "a list": (scores(b"[1]"), r"\[1\] for a score"),
    "an object": (scores(b'{"a": 1}'), "for a score"),
    "long text": (scores(b'"' + b"x" * 100_000 + b'"'), "x… for a score"),
    "escapes as a score": (scores(b'"' + ESCAPE + b'"'), r"'\\x1b\[2J' for a score"),
    "too few": (says(http(b'{"scores": [1, 2]}')), "2 scores for 3 images"),
    "too many": (says(http(b'{"scores": [%s0]}' % (b"0," * 9999))), "10000 scores for 3"),
    "scores is text": (says(http(b'{"scores": "1,2,3"}')), "answered without scores"),
    "nothing": (says(http(b"")), "not JSON"),
    "a byte order mark": (says(http(b'\xef\xbb\xbf{"scores": [1, 2, 3]}')), "not JSON"),
    "utf-16": (says(http('{"scores": [1, 2, 3]}'.encode("utf-16"))), "not JSON"),
    "no utf-8": (says(http(b'{"scores": [1, 2, "\xff\xfe"]}')), "not JSON"),
    "a terabyte announced": (says(http(b"", length=10**12)), "announced 1000000000000 bytes"),
    "a flood": (endless(OK + b"\r\n", b" " * 65536), "more than 1048576 bytes"),
    "chunks for ever": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 4096), "sent more than"
    ),
    "a chunk of negative size": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", b" " * 65536), "broke off"
    ),
    "a chunk of size -1": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b" " * 65536), "sent more than"
    ),
    "a chunk of no size": (
        says(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "announced|broke off"
    ),
    "trailers for ever": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 4096),
        "sent more than|broke off",
    ),
    "headers for ever": (endless(OK, b"a: b\r\n" * 4096), "broke off"),
    "a header without end": (endless(OK + b"a: ", b"b" * 65536), "broke off"),
    "a status without end": (endless(b"HTTP/1.1 200 ", b"O" * 65536), "broke off"),
    "to be continued": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999), "sent more than"),
    "early hints": (says(b"HTTP/1.1 103 Early Hints\r\n\r\n"), "status 103"),
    "status 999": (says(http(b"", "999 No")), "failed"),
    "no status": (says(b"HTTP/1.1 abc OK\r\n\r\n"), "broke off"),
    "http/0.9": (says(b'{"scores": [1, 2, 3]}'), "broke off"),
    "http/9": (says(b"HTTP/9.0 200 OK\r\n\r\n"), "broke off"),
    "a drip": (trickles, r"no answer in 0\.4 s"),
    "silence": (silent, r"no answer in 0\.4 s"),
    "promises more": (says(http(b'{"scores": [1, 2, 3]}', length=99)), "announced 99 bytes"),
    "promises less": (says(http(b'{"scores": [1, 2, 3]}', length=5)), "not JSON"),
    "a negative length": (says(OK + b'Content-Length: -1\r\n\r\n{"scores": [1]}'), "1 scores for"),
    "hangs up": (reset(b""), "broke off"),
    "hangs up in its answer": (
        reset(OK + b"Content-Length: 99\r\n\r\n{"), "broke off|announced 99"
    ),
    "gzip": (
        says(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b" " * 10**7)),
        "encoding 'gzip', unasked",
    ),
    "an odd encoding": (says(OK + b"Content-Encoding: \x1b[2J\r\n\r\n"), "unasked|broke off"),
    "a sign-in page": (
        says(OK + b"Content-Type: text/html\r\n\r\n<!doctype html>\x1b[2J"), "not JSON"
    ),
    "a redirect": (
        says(b"HTTP/1.1 307 Moved\r\nLocation: /mean\r\nContent-Length: 0\r\n\r\n"),
        "status 307, a redirect, which is not followed",
    ),
    "escapes in an error": (
        says(http(b'{"error": "%s%s\\r\\nfatal"}' % (ESCAPE, BELL), "422 No")),
        r"refused the batch: \\x1b\[2J\\x07 fatal",
    ),
    "escapes in a failure": (
        says(http(b'{"error": "\\u001b]0;title\\u0007 \\u202e x"}', "500 No")), r"\\u202e x"
    ),
    "escapes in no error": (says(http(b"\x1b[31mred\x07", "404 No")), "status 404"),
    "a long error": (says(http(b'{"error": "%s"}' % (b"x" * 10**5), "422 No")), "x…"),
    "an error that is none": (says(http(b'{"error": {"a": 1}}', "500 No")), "failed: '{"),
    "a nested error": (says(http(b'{"error": ' + b"[" * 10**5, "422 No")), "refused the batch"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "the-secret-token-of-this-test")
    yield


def ask(port: int, **options: float) -> torch.Tensor:
    settings = Settings(**({"timeout": 5.0, "retries": 0} | options))
    reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean", settings)
    return checked(reward, torch.rand(3, 3, 4, 4), ["a", "b", "c"], [{}] * 3)


def orderly(error: ValueError, port: int) -> None:
    said = str(error)
    assert said.startswith("reward 'mean': ") and f"127.0.0.1:{port}" in said
    assert said.isprintable() and len(said) < 600 and "secret" not in said


def test_there_are_forty() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_answer_is_one_sentence(how: str) -> None:
    reply, message = HOSTILE[how]
    timeout = 0.4 if "0\\.4" in message else 5.0
    with server(reply) as port:
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(ValueError, match=message) as caught:
            ask(port, timeout=timeout)
        assert time.monotonic() - began < 4
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    orderly(caught.value, port)
    assert peak < 40 * 2**20


HEALTHS = {
    "nested": b"[" * 10**5,
    "no object": b"[1, 2]",
    "rewards are a list": b'{"rewards": [1, 2]}',
    "rewards are a number": b'{"rewards": 3}',
    "escapes": b'{"rewards": {"\\u001b[31mmean": {}}}',
    "none of its name": b'{"rewards": {"mena": {}}}',
}


@pytest.mark.parametrize("how", HEALTHS)
def test_hostile_health_is_one_sentence(how: str) -> None:
    with (
        server(says(b""), health=says(http(HEALTHS[how]))) as port,
        pytest.raises(ValueError, match="no reward 'mean'|as no reward server does") as caught,
    ):
        ask(port)
    orderly(caught.value, port)


def test_neither_images_nor_token_follow_a_redirect() -> None:
    asked: list[bytes] = []

    def elsewhere(connection: socket.socket, body: bytes) -> None:
        asked.append(body)

    with server(elsewhere, health=elsewhere) as other:
        there = b"http://127.0.0.1:%d/mean" % other
        for status in (b"301", b"302", b"303", b"307", b"308"):
            answer = b"HTTP/1.1 %s X\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, there)
            for reply, health in ((answer, http(HEALTH)), (b"", answer)):
                with (
                    server(says(reply), health=says(health)) as port,
                    pytest.raises(ValueError, match="a redirect, which is not followed"),
                ):
                    ask(port)
    assert not asked


def test_only_what_may_pass_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    counts = {}
    for how in ("escapes in a failure", "escapes in an error", "nan", "gzip", "a redirect"):
        count = 0

        def counted(connection: socket.socket, body: bytes, how: str = how) -> None:
            nonlocal count
            count += 1
            HOSTILE[how][0](connection, body)

        with server(counted) as port, pytest.raises(ValueError), caplog.at_level(logging.WARNING):
            ask(port, retries=2)
        counts[how] = count
    assert list(counts.values()) == [3, 1, 1, 1, 1]
    assert caplog.messages and all(line.isprintable() for line in caplog.messages)


def test_a_body_beyond_the_limit_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(connection: socket.socket, body: bytes) -> None:
        n = len(wire.decode_batch(body)[1])
        connection.sendall(http(b'{"scores": [%s]}' % b",".join([b"%d" % n] * n)))

    with server(count) as port:
        assert ask(port).tolist() == [3, 3, 3]
        monkeypatch.setattr(client, "BODY_LIMIT", 300)
        assert ask(port).tolist() == [1, 1, 1]


# --- settings and secrets -----------------------------------------------------------------------


@pytest.mark.parametrize("option", ["timeout", "retries", "patience", "batch"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -1, 10**30, "x", []])
def test_an_option_that_makes_no_sense_is_one_sentence(option: str, value: object) -> None:
    name = "remote:http://127.0.0.1:9/mean"
    with pytest.raises(ValueError, match=f"^reward '{name}': option {option} ") as caught:
        load_reward(name, options={option: value})
    assert len(str(caught.value)) < 250
    if isinstance(value, float):
        text = str(value).replace("inf", ".inf").replace("nan", ".nan")
        with pytest.raises(ValueError, match=f"option {option} "):
            load_config(
                "demo_tilt",
                [
                    "model.few_step=x",
                    f"rewards={{'{name}': {{weight: 1.0, options: {{{option}: {text}}}}}}}",
                ],
            )


SECRET_NAMES = [
    "remote:http://user:s3cret@host:8000/mean", "remote:http://:s3cret@host:8000/mean",
    "remote:http://s3cret@host/mean", "remote:http://host/mean?token=s3cret",
    "remote:https://host/mean?api_key=s3cret", "remote:http://host/mean#s3cret",
    "remote:user:s3cret@host/mean", "remote:ftp://user:s3cret@host/mean",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_in_an_address_is_refused_and_not_repeated(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"stage: tilt\nrewards: {{'{name}': 1.0}}\n")
    base = ["model.few_step=x"]
    attempts = [
        lambda: load_config("demo_tilt", [*base, f"rewards={{'{name}': 1.0}}"]),
        lambda: load_config("demo_tilt", [*base, f"rewards={{'{name}': [}}"]),
        lambda: load_config("demo_tilt", [*base, f"rewards.{name}.weight=abc"]),
        lambda: load_config("demo_tilt", [*base, f"watch.rewards.{name}.options.batch=abc"]),
        lambda: load_config(str(recipe)),
        lambda: named_rewards([name]),
        lambda: load_reward(name),
        lambda: Address.of(name),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="TILTFLOW_REWARD_TOKEN") as caught:
            attempt()
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "model.path=https://me:s3cret@host/model", "data.prompts=http://host/p.txt?token=s3cret",
        "rewards.mine:Mine.options.token=s3cret", "rewards.mine:Mine.options.api_key=s3cret",
        "rewards.mine:Mine.options={auth: {password: s3cret}}",
        "rewards.mine:Mine.options.server=https://me:s3cret@host",
    ],
)  # fmt: skip
def test_no_setting_may_hold_a_secret(override: str) -> None:
    with pytest.raises(ValueError, match="run directory would keep") as caught:
        load_config("demo_tilt", ["model.few_step=x", override])
    assert "s3cret" not in str(caught.value)


def test_what_only_looks_like_a_secret_is_let_through() -> None:
    refuse_secrets({"options": {"max_tokens": 8, "token": 3, "pad_token": "x", "mail": "a@b.c"}})
    refuse_secrets(["hf://datasets/a/b@main/x", "runs/a@b", "clip@/models/clip", "p=1", "a: b@c"])


@pytest.mark.parametrize("token", ["two\r\nlines: 1", "späte", "a b", "\x1b[2J"])
def test_a_token_that_no_header_can_hold_is_not_repeated(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wire.TOKEN_VARIABLE, token)
    with (
        server(says(b"")) as port,
        pytest.raises(ValueError, match="TILTFLOW_REWARD_TOKEN must be ASCII") as caught,
    ):
        ask(port)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["http://ho st/mean", "http://[::1/mean", "http://[zz]/mean", "http://a..b/mean", "http:///mean",
     "http://" + "a" * 300 + "/mean", "http://host:0/mean", "http://host:x/mean", "http://h/%0a",
     "http://h/a\x1b/mean", "http://h\x00/mean", "http://%41/mean", "mean", ""],
)  # fmt: skip
def test_what_is_no_address_is_one_printable_sentence(address: str) -> None:
    with pytest.raises(ValueError, match="remote reward") as caught:
        Address.of(f"remote:{address}")
    assert str(caught.value).isprintable()


def test_addresses_come_back_as_they_were() -> None:
    for url in (
        "http://h:8000/mean",
        "https://a.b/x/y/mean",
        "http://[::1]:80/m:f",
        "http://h_1/m",
    ):
        assert Address.of(f"remote:{url}").url == url


def test_text_of_others_is_printable() -> None:
    assert printable("a\x1b[2J\nb\x07\u202e c") == r"a\x1b[2J b\x07\u202e c"
    assert re.fullmatch("x{300}…", printable("x" * 10**6))
