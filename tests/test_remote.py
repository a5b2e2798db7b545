"""Remote rewards: what is said on the wire, a server that works, and those that do not."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_servers import Reply, http, says, server, trickles
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.interruption import Stopped, interruptible
from tiltflow.rewards import FunctionReward, checked, load_reward
from tiltflow.rewards.remote import client, wire
from tiltflow.rewards.remote.client import RemoteReward, Settings
from tiltflow.rewards.remote.limits import Limits

QUICK = Settings(timeout=0.3, retries=2)
PATIENT = Settings(timeout=10.0, retries=2)
"""For servers that answer at once: a busy machine must not look like a slow server."""
IMAGES = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
PROMPTS, METADATA = ["a", "b ✓", "c"], [{"tag": "x"}, {"n": [1, None]}, {}]


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.1)
    monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)


def score(reward: RemoteReward, count: int = 3) -> Tensor:
    return checked(reward, IMAGES[:count], PROMPTS[:count], METADATA[:count])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# --- the wire ---------------------------------------------------------------------------------


def png(size: tuple[int, int], mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def body(images: list[str], **changes: object) -> bytes:
    whole = {"images": images, "prompts": ["p"] * len(images), "metadata": [{}] * len(images)}
    return json.dumps(whole | changes).encode()


def test_a_batch_survives_the_wire_to_eight_bits() -> None:
    images, prompts, metadata = wire.decode_batch(wire.encode_batch(IMAGES, PROMPTS, METADATA))
    assert torch.equal(images, (IMAGES * 255).round() / 255)
    assert (prompts, metadata) == (PROMPTS, METADATA)
    assert images.dtype == torch.float32


def test_metadata_that_json_cannot_hold_names_the_prompt() -> None:
    for about in ({"x": {1, 2}}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="metadata of 'b ✓' cannot be sent as JSON"):
            wire.encode_batch(IMAGES, PROMPTS, [{}, about, {}])


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"<html>", "no request for scores"),
        (b"{}", "no request for scores: images"),
        (body([png((4, 4))], path="/etc/passwd"), "path Extra inputs"),
        (body(["/etc/passwd"]), "image 0 is no PNG"),
        (body([base64.b64encode(b"GIF89a").decode()]), "image 0 is no PNG"),
        (body([png((4, 4)), png((4, 5))]), "one size"),
        (body([png((4, 4), "L")]), "image 0 is L, not RGB"),
        (body([png((4, 4))], prompts=[]), "1 images, 0 prompts"),
        (body([]), "1 to 256 images, got 0"),
        (body([png((4, 4))[:60]]), "image 0 is a damaged PNG"),
        (body([png((8200, 4100), "1")]), "image 0 is 8200×4100, more than"),
        (body([png((4096, 4096))] * 5), "more than 67108864 pixels"),
    ],
)
def test_bad_requests_are_refused(sent: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wire.decode_batch(sent)


# --- servers that do what they should not -----------------------------------------------------

FAULTY: dict[str, tuple[Reply, str]] = {
    "hangs": (lambda connection, body: time.sleep(1.5), r"gave no answer in 0\.3 s \(3 attempts\)"),
    "trickles": (trickles, r"gave no answer in 0\.3 s"),
    "promises too much": (
        says(http(b'{"scores": [1, 2, 3]}', length=500)), "announced 500 bytes and sent 21",
    ),
    "promises too little": (says(http(b'{"scores": [1, 2, 3]}', length=9)), "what is not JSON"),
    "promises a flood": (says(http(b"", length=10**12)), "announced 1000000000000 bytes"),
    "sends a flood": (says(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2**20 + 9)), "more than 1048576"),
    "html": (says(http(b"<!doctype html><p>Sign in")), "not JSON: '<!doctype html><p>Sign in'"),
    "html error": (says(http(b"<p>No", "418 Teapot")), "status 418: '<p>No'"),
    "nan": (says(http(b'{"scores": [1, NaN, 2]}')), r"not finite \(image 1\)"),
    "infinite": (says(http(b'{"scores": [1, 1e999, 2]}')), r"not finite \(image 1\)"),
    "null": (says(http(b'{"scores": [null, 1, 2]}')), r"None for a score \(image 0\)"),
    "text": (says(http(b'{"scores": ["1", 1, 2]}')), r"'1' for a score \(image 0\)"),
    "true": (says(http(b'{"scores": [true, 1, 2]}')), "True for a score"),
    "too few": (says(http(b'{"scores": [1, 2]}')), "2 scores for 3 images"),
    "too many": (says(http(b'{"scores": [1, 2, 3, 4]}')), "4 scores for 3 images"),
    "nothing": (says(http(b"{}")), "answered without scores"),
    "list": (says(http(b"[1, 2, 3]")), "answered without scores"),
    "says no http": (says(b"SSH-2.0-OpenSSH_9.9\r\n"), r"broke off .*BadStatusLine"),
    "hangs up": (lambda connection, body: None, "broke off without an answer"),
    "fails": (says(http(b'{"error": "CUDA out of memory"}', "500 Oh")), "failed: CUDA out of mem"),
    "refuses": (says(http(b'{"error": "no such tag"}', "422 No")), "refused the batch: no such"),
    "moves": (says(http(b"", "301 Moved")), "answered with status 301"),
    "wants a token": (says(http(b'{"error": "token"}', "401 No")), "set TILTFLOW_REWARD_TOKEN"),
}  # fmt: skip


@pytest.mark.parametrize("how", FAULTY)
def test_a_faulty_server_is_one_clear_error(how: str) -> None:
    reply, message = FAULTY[how]
    with server(reply) as port:
        settings = QUICK if how in ("hangs", "trickles") else PATIENT
        reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean", settings)
        began = time.monotonic()
        with pytest.raises(ValueError, match=message) as caught:
            score(reward)
    assert str(caught.value).startswith(f"reward 'mean': http://127.0.0.1:{port}/mean ")
    assert "\n" not in str(caught.value) and time.monotonic() - began < 8


def test_a_fault_that_passes_costs_nothing() -> None:
    replies = [says(http(b"oops", "500 Oh")), says(b""), says(http(b'{"scores": [3, 1, 2]}'))]
    with server(lambda connection, body: replies.pop(0)(connection, body)) as port:
        reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean", PATIENT)
        assert score(reward).tolist() == [3, 1, 2]


def test_a_server_that_dies_and_comes_back_pauses_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No attempt is counted while nobody is there: more of them fail than `retries`."""
    port = free_port()
    scores = says(http(b'{"scores": [3, 1, 2]}'))
    with server(scores, port):
        reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean", Settings(10.0, retries=0))
        assert score(reward).tolist() == [3, 1, 2]
    found: list[Tensor] = []
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run = threading.Thread(target=lambda: found.append(score(reward)))
        run.start()
        deadline = time.monotonic() + 30
        while len(caplog.records) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.is_alive() and not found
        starting = [says(http(b"", "503 Busy")), scores]
        with server(lambda connection, body: starting.pop(0)(connection, body), port):
            run.join(timeout=30)
    assert found[0].tolist() == [3, 1, 2]
    waits = [r.message for r in caplog.records if "the run waits" in r.message]
    assert len(waits) >= 4 and "connection refused" in waits[0] and "status 503" in waits[-1]
    assert "is back" in caplog.records[-1].message


def test_patience_ends_the_wait_with_how_to_go_on() -> None:
    port = free_port()
    with server(says(b""), port):
        reward = RemoteReward(
            f"remote:http://127.0.0.1:{port}/mean", Settings(10.0, retries=0, patience=0.2)
        )
    with pytest.raises(ValueError, match=r"connection refused.*reward-server mean.*run\.resume"):
        score(reward)


def test_a_signal_ends_the_wait() -> None:
    port = free_port()
    with server(says(b""), port):
        reward = RemoteReward(f"remote:http://127.0.0.1:{port}/mean", PATIENT)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with interruptible() as stopped:
        timer.start()
        with pytest.raises(Stopped):
            score(reward)
        assert stopped.is_set()


def test_what_is_asked_for_must_be_there() -> None:
    with pytest.raises(ValueError, match="no server answers .*reward-server mean"):
        load_reward(f"remote:http://127.0.0.1:{free_port()}/mean", options={"timeout": 0.1})
    with server(says(b"")) as port:
        place = f"remote:http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match="no reward 'maen'; did you mean 'mean'"):
            load_reward(f"{place}/maen")
        assert load_reward(f"{place}/mean", options={"batch": 2}).name == "mean"
        with pytest.raises(ValueError, match="no option 'tries'"):
            load_reward(f"{place}/mean", options={"tries": 2})
        with pytest.raises(ValueError, match="takes no path"):
            load_reward(f"{place}/mean", path="/weights")
    with (
        server(says(b""), health=says(http(b"<p>hello"))) as port,
        pytest.raises(ValueError, match="as no reward server does: '<p>hello'"),
    ):
        load_reward(f"remote:http://127.0.0.1:{port}/mean")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("remote:127.0.0.1:8000/mean", "write remote:http://HOST:PORT/NAME"),
        ("remote:http://127.0.0.1:8000/", "write remote:http://HOST:PORT/NAME"),
        ("remote:ftp://127.0.0.1/mean", "write remote:http://HOST:PORT/NAME"),
        ("remote:file:///etc/passwd", "write remote:http://HOST:PORT/NAME"),
        ("remote:http://me:secret@127.0.0.1/mean", "TILTFLOW_REWARD_TOKEN"),
        ("remote:http://127.0.0.1/mean?token=x", "TILTFLOW_REWARD_TOKEN"),
        ("remote:http://127.0.0.1:99999/mean", "[Pp]ort"),
    ],
)
def test_bad_addresses(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(address)


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": "ten"}, {"retries": -1}, {"batch": 0}, {"batch": 1000},
     {"patience": -1}, {"retries": None}, {"batch": True}],
)  # fmt: skip
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"option {next(iter(options))}"):
        load_reward("remote:http://127.0.0.1:8000/mean", options=options)


def test_a_recipe_names_a_remote_reward(tmp_path: Path) -> None:
    name = "remote:http://127.0.0.1:8000/mean"
    config = load_config(
        "demo_tilt",
        ["model.few_step=x", f"rewards={{'{name}': 2.0}}", f"rewards.{name}.options.batch=4"],
    )
    assert list(config.rewards) == [name]
    assert (config.rewards[name].weight, config.rewards[name].options) == (2.0, {"batch": 4})


# --- the real server --------------------------------------------------------------------------


class Mean:
    name, differentiable, domain, at_once = "mean", True, "images", None

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor, prompts: list[str], metadata: list) -> Tensor:
        self.batches.append(len(images))
        if "fail" in prompts:
            raise RuntimeError("out of memory")
        values = images.mean((1, 2, 3)) + torch.tensor([float(m.get("plus", 0)) for m in metadata])
        return values / 0 if "nan" in prompts else values


@pytest.fixture
def serve() -> Iterator:
    """`serve(rewards, batch, token)` starts a real server and gives its address."""
    uvicorn = pytest.importorskip("uvicorn")
    from tiltflow.rewards.remote.server import Scorer, make_app

    running = []

    def start(rewards: list, batch: int = 2, token: str | None = None, limits=None) -> str:
        app = make_app(Scorer(rewards, "cpu", batch), token, limits)
        config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
        made = uvicorn.Server(config)
        thread = threading.Thread(target=made.run, daemon=True)
        thread.start()
        while not made.started:
            time.sleep(0.01)
        running.append((made, thread))
        port = made.servers[0].sockets[0].getsockname()[1]
        return f"remote:http://127.0.0.1:{port}"

    yield start
    for made, thread in running:
        made.should_exit = True
        thread.join()


def post(address: str, data: bytes, headers: dict[str, str], path: str = "/mean") -> tuple:
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    parts = urlsplit(address.removeprefix("remote:"))
    connection = HTTPConnection(parts.hostname, parts.port, timeout=5)
    try:
        connection.request("POST" if data else "GET", path, data or None, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_remote_scores_are_the_local_ones(serve) -> None:
    reward = Mean()
    remote = load_reward(f"{serve([reward])}/mean", options={"batch": 3})
    images = torch.cat([IMAGES, IMAGES.flip(0), IMAGES[:1]])
    prompts, metadata = [*PROMPTS, *PROMPTS, "d"], [{"plus": i} for i in range(7)]
    found = checked(remote, images, prompts, metadata)
    local = checked(Mean(), (images * 255).round() / 255, prompts, metadata)
    assert torch.allclose(found, local, atol=1e-6)
    # In requests of three, each scored two at a time, and of the first two one is looked at again.
    assert reward.batches == [2, 1, 1, 2, 1, 1]
    assert not remote.differentiable


def test_a_reward_of_ones_own_is_served_by_its_dotted_name(serve) -> None:
    own = FunctionReward(lambda x, p, m: x.amax((1, 2, 3)), "my_rewards:brightest")
    remote = load_reward(f"{serve([own])}/my_rewards:brightest")
    assert remote.name == "my_rewards:brightest"
    assert torch.allclose(score(remote), IMAGES.amax((1, 2, 3)), atol=1 / 255)


def test_what_fails_over_there_fails_here(serve) -> None:
    remote = RemoteReward(f"{serve([Mean()])}/mean", PATIENT)
    with pytest.raises(ValueError, match=r"refused the batch: .*non-finite score for 'nan'"):
        checked(remote, IMAGES[:1], ["nan"], [{}])
    with pytest.raises(ValueError, match=r"RuntimeError: out of memory \(3 attempts\)"):
        checked(remote, IMAGES[:1], ["fail"], [{}])
    assert score(remote).shape == (3,)  # and it serves on


def test_the_server_guards_its_door(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    address, kind = serve([Mean()]), {"Content-Type": "application/json"}
    good = wire.encode_batch(IMAGES, PROMPTS, [{}] * 3)
    assert post(address, good, kind)[0] == 200
    status, said = post(address, b"", {}, "/health")
    assert status == 200 and said["rewards"].keys() == {"mean"}
    assert said["rewards"]["mean"].keys() == {"differentiable", "contents"}
    assert set(said) == {"rewards", "made_of"}
    assert said["made_of"]["torch"] == torch.__version__ and "cpu" in said["made_of"]["device"]
    assert post(address, good, kind, "/maen")[0] == 404
    assert post(address, good, {"Content-Type": "text/plain"})[0] == 415
    assert post(address, b"{}", kind)[0] == 422
    status, said = post(address, good, kind | {"Host": "evil.example"})
    assert status == 403 and "loopback" in said["error"]
    status, said = post(serve([Mean()], limits=Limits(body=50)), good, kind)
    assert status == 413 and "50 bytes" in said["error"]


def test_a_token_is_asked_for_and_given(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    address = serve([Mean()], token="a-long-enough-token")
    for token in (None, "another-long-token"):
        if token:
            monkeypatch.setenv(wire.TOKEN_VARIABLE, token)
        with pytest.raises(ValueError, match="refused the token: the token is missing or wrong"):
            load_reward(f"{address}/mean")
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "a-long-enough-token")
    assert score(load_reward(f"{address}/mean")).shape == (3,)


def test_an_open_host_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltflow.rewards.remote.server import token_for

    assert token_for("127.0.0.1") is None
    with pytest.raises(ValueError, match="0.0.0.0 is open to other machines.*TILTFLOW_REWARD"):
        token_for("0.0.0.0")
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "short")
    with pytest.raises(ValueError, match="16 ASCII characters"):
        token_for("0.0.0.0")
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "a-long-enough-token")
    assert token_for("0.0.0.0") == "a-long-enough-token"


def test_a_server_serves_images_by_name_only() -> None:
    from tiltflow.rewards.remote.server import Scorer, is_loopback

    mine = [FunctionReward(lambda x, p, m: x, "mine", domain=d) for d in ("points", "videos")]
    wrong = [([one], f"'mine' scores {one.domain}; only") for one in mine]
    for rewards, message in (*wrong, ([], "one or more"), ([Mean(), Mean()], "dif")):
        with pytest.raises(ValueError, match=message):
            Scorer(rewards, "cpu", 2)
    assert [is_loopback(h) for h in ("localhost", "127.0.0.2", "::1")] == [True] * 3
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "example.org", "10.0.0.1")] == [False] * 4
