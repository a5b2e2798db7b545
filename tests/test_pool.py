"""Several reward servers behind one name: what is spread, left out, taken back and refused."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from reward_servers import await_listening, free_port, http, process, says, server
from rich.console import Console
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.interruption import Stopped, interruptible
from tiltflow.core.metrics import read_metrics
from tiltflow.rewards import load_reward
from tiltflow.rewards.base import Reward, checked
from tiltflow.rewards.remote import client, wire
from tiltflow.tasks.train import run_training

IMAGES = torch.rand(9, 3, 8, 6, generator=torch.Generator().manual_seed(0))
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.1)
    monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)


class Served:
    """A server of the reward `mean` that can be put out, and counts what it has scored."""

    def __init__(
        self, delay: float = 0.0, plus: float = 0.0, made_of: str = "1.0", contents: str = "c0"
    ) -> None:
        self.port, self.delay, self.plus, self.scored = free_port(), delay, plus, 0
        self.made_of, self.contents = made_of, contents
        self._open = ExitStack()
        self.put_up()

    def put_up(self) -> None:
        about = {"mean": {"differentiable": False, "contents": self.contents}}
        said = {"rewards": about, "made_of": {"torch": self.made_of}}
        health = says(http(json.dumps(said).encode()))
        self._open.enter_context(server(self.score, self.port, health))

    def put_out(self) -> None:
        self._open.close()

    def score(self, connection: socket.socket, body: bytes) -> None:
        images, prompts, _ = wire.decode_batch(body)
        time.sleep(self.delay)
        if "bad" in prompts:
            connection.sendall(http(b'{"error": "no memory"}', "500 Oh"))
            return
        self.scored += len(images)
        scores = (images.mean((1, 2, 3)) + self.plus).tolist()
        said = {"scores": scores, "contents": self.contents}
        connection.sendall(http(json.dumps(said).encode()))

    @property
    def place(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(*given: float, **named: float | str) -> Served:
        made.append(Served(*given, **named))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for one in made:
        one.put_out()


def pool(servers: Sequence[Served], **options: object) -> Reward:
    places = [one.place for one in servers]
    chosen = {"servers": places, "batch": 1, "timeout": 10.0, "retries": 0} | options
    return load_reward("remote:mean", options=chosen)


def score(reward: Reward, prompt: str = "a") -> Tensor:
    return checked(reward, IMAGES, [prompt] * 9, [{}] * 9)


def test_requests_are_spread_and_scores_are_those_of_one_server(serve) -> None:
    servers = [serve(0.02) for _ in range(3)]
    found = score(pool(servers))
    assert torch.equal(found, score(pool(servers[:1])))
    assert torch.equal(found, score(load_reward(f"remote:{servers[0].place}/mean")))
    assert all(one.scored > 1 for one in servers[1:])  # beside the first image
    assert servers[1].scored + servers[2].scored < 9 + 2


def test_one_that_dies_is_left_out_and_taken_back(serve, caplog: pytest.LogCaptureFixture) -> None:
    a, b = serve(0.01), serve(0.01)
    reward = pool([a, b])
    whole = score(reward)
    b.put_out()
    assert torch.equal(score(reward), whole)
    assert f"{b.place}/mean is left out: no server answers" in caplog.text
    assert "1 of 2 servers are left" in caplog.text and a.place not in caplog.text
    b.put_up()
    before, deadline = b.scored, time.monotonic() + 30
    while b.scored < before + 2 and time.monotonic() < deadline:
        assert torch.equal(score(reward), whole)
    assert f"{b.place}/mean answers again and is taken back" in caplog.text


def test_one_that_hangs_is_left_out(serve, caplog: pytest.LogCaptureFixture) -> None:
    a, b = serve(), serve()
    reward = pool([a, b], timeout=0.5)
    whole = score(reward)
    b.delay = 1.5
    assert torch.equal(score(reward), whole)
    assert f"{b.place}/mean is left out: gave no answer in 0.5 s" in caplog.text


def test_a_pool_begins_without_one_that_is_away(serve, caplog: pytest.LogCaptureFixture) -> None:
    a, b = serve(), serve()
    b.put_out()
    assert score(pool([b, a])).shape == (9,)
    assert f"{b.place}/mean is left out" in caplog.text


def test_servers_that_are_not_alike_are_refused(serve) -> None:
    a, newer, other = serve(), serve(made_of="2.0"), serve(plus=1e-6)
    with pytest.raises(ValueError, match=r'has torch "\d.0", and .* must be alike'):
        pool([a, newer])
    reward = pool([a, other])  # they say the same, but do not score alike
    with pytest.raises(ValueError, match="must be alike to the last bit"):
        score(reward)
    with pytest.raises(ValueError, match="has no reward 'maen'; did you mean 'mean'"):
        load_reward("remote:maen", options={"servers": [a.place]})


def test_one_that_comes_back_as_another_stays_out(serve, caplog: pytest.LogCaptureFixture) -> None:
    a, b = serve(0.01), serve(0.01)
    reward = pool([a, b])
    whole = score(reward)
    b.put_out()
    score(reward)
    b.plus, before = 1.0, b.scored
    b.put_up()
    deadline = time.monotonic() + 30
    while "is still left out: scores an image" not in caplog.text and time.monotonic() < deadline:
        assert torch.equal(score(reward), whole)
    assert "must be alike to the last bit" in caplog.text
    # the first image alone, and that no more often than it was tried
    assert 0 < b.scored - before <= caplog.text.count("still left out")


def test_servers_with_other_contents_are_refused_though_they_score_alike(serve) -> None:
    with pytest.raises(ValueError, match=r'has contents "c\d", and .* must be alike'):
        pool([serve(), serve(contents="c1")])


def test_one_that_was_replaced_between_two_calls_is_left_out(
    serve, caplog: pytest.LogCaptureFixture
) -> None:
    """It was never seen to be away, and scores the first image as before."""
    a, b = serve(0.01), serve(0.01)
    reward = pool([a, b])
    whole = score(reward)
    b.put_out()
    b.contents = "c1"
    b.put_up()
    assert torch.equal(score(reward), whole)
    assert f"{b.place}/mean is left out: was started again with other code" in caplog.text
    a.put_out()
    a.contents = "c1"
    a.put_up()
    with pytest.raises(ValueError, match="no server is left .*started again with other code"):
        score(reward)


def test_when_none_is_left_the_rules_of_one_server_end_the_run(serve) -> None:
    a, b = serve(), serve()
    patient, tried = pool([a, b], patience=0.3), pool([a, b], timeout=0.3, retries=1)
    score(patient), score(tried)
    a.delay = b.delay = 1.0
    with pytest.raises(ValueError, match=r"no server is left \(.*no answer in 0.3 s, .*resume="):
        score(tried)
    a.put_out(), b.put_out()
    with pytest.raises(ValueError, match=r"no server is left \(.*refused.*, .*refused.*\); start"):
        score(patient)
    with pytest.raises(ValueError, match="no server is left"):
        pool([a, b], timeout=0.2)


def test_a_batch_that_fails_everywhere_is_an_error(serve) -> None:
    reward = pool([serve(), serve()], retries=1, batch=9)
    score(reward)
    with pytest.raises(ValueError, match=r"failed: no memory \(3 attempts, at several servers\)"):
        score(reward, "bad")
    assert score(reward).shape == (9,)


def test_a_stop_ends_the_wait(serve) -> None:
    servers = [serve(), serve()]
    reward = pool(servers)
    score(reward)
    for one in servers:
        one.put_out()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with interruptible() as stopped:
        timer.start()
        with pytest.raises(Stopped):
            score(reward)
        assert stopped.is_set()


@pytest.mark.parametrize(
    ("name", "servers", "message"),
    [
        ("remote:mean", ["127.0.0.1:8000"], "number 1, is to be host and port alone"),
        ("remote:mean", ["http://a", "http://me:secret@b"], "number 2, is to be host and port"),
        ("remote:mean", ["http://a:1", "http://a:1/"], "has http://a:1/mean twice"),
        ("remote:mean", [], "option servers is"),
        ("remote:mean", "http://a", "option servers is"),
        ("remote:http://a:1/mean", ["http://b:1"], "to be named remote:NAME"),
        ("remote:mean", None, "write remote:http://HOST:PORT/NAME, or remote:NAME with the opt"),
    ],
)
def test_bad_pools(name: str, servers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(name, options={} if servers is None else {"servers": servers})
    assert "secret" not in str(caught.value)


def test_a_recipe_names_a_pool() -> None:
    chosen = ["rewards={'remote:mean': 1}",
              "rewards.remote:mean.options.servers=[http://a:1, http://b:1]"]  # fmt: skip
    config = load_config("demo_tilt", ["model.few_step=x", *chosen])
    assert config.rewards["remote:mean"].options == {"servers": ["http://a:1", "http://b:1"]}


# --- a run --------------------------------------------------------------------------------------

STEPS, BATCH, REWARD = 6, 6, "reward_servers:unhurried_mean"
AT_STEP: dict[int, Callable[[], None]] = {}
ASKED: list[int] = []


def gate(images: Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> Tensor:
    """A reward here, asked in the middle of a step, that has things happen to the servers."""
    ASKED.append(len(images))
    AT_STEP.pop(sum(ASKED) // BATCH, lambda: None)()
    return images.amax((1, 2, 3))


gate.at_once = None  # type: ignore[attr-defined]


def settings(model: Path, folder: Path, stage: str, servers: Sequence[int]) -> list[str]:
    values = {
        "model.path": model, "model.autocast": "null", "model.max_sequence_length": 8,
        "adapters.rank": 2, "data.prompts": folder / "p.txt", "data.eval_prompts": folder / "p.txt",
        "train.steps": 1 if stage == "cold_start" else STEPS, "train.batch_size": BATCH,
        "watch.rewards": "{}", "log.every": 1, "log.samples_every": 0, "run.device": "cpu",
    }  # fmt: skip
    if stage == "tilt":
        options = {"timeout": 2, "batch": 1, "servers": [f"http://127.0.0.1:{p}" for p in servers]}
        rewards = {f"remote:{REWARD}": {"weight": 1, "options": options}, "test_pool:gate": 1}
        values |= {
            "tilt.group_size": 3, "model.few_step": folder / "cold_start",
            "rewards": json.dumps(rewards),
        }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.long
def test_a_run_loses_two_of_three_real_servers_and_comes_to_the_same(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One is killed and one hangs in the middle; both are taken back."""
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    ports = [free_port() for _ in range(3)]
    running = [process(REWARD, port, tmp_path / "said") for port in ports]

    def train(stage: str, out: str, servers: Sequence[int]) -> Path:
        ASKED.clear()
        chosen = settings(tiny_pipeline("sd35m"), tmp_path, stage, servers)
        config = load_config(f"demo_{stage}", [*chosen, f"run.out={tmp_path / out}"])
        return run_training(config, QUIET)

    def lose() -> None:
        running[0].kill()
        running[0].wait()
        running[1].send_signal(signal.SIGSTOP)

    def find() -> None:
        running[1].send_signal(signal.SIGCONT)
        running[0] = process(REWARD, ports[0], tmp_path / "said")
        await_listening(running[0], ports[0])

    try:
        train("cold_start", "cold_start", ())
        for served, port in zip(running, ports, strict=True):
            await_listening(served, port)
        alone = train("tilt", "alone", ports[2:])
        assert not any(str(port) in caplog.text for port in ports)
        AT_STEP.update({2: lose, 4: find})
        with caplog.at_level(logging.WARNING):
            pooled = train("tilt", "pooled", ports)
    finally:
        for served in running:
            served.kill()
            served.wait()
    for port in ports[:2]:
        place = f"http://127.0.0.1:{port}/{REWARD}"
        left, back = f"{place} is left out", f"{place} answers again and is taken back"
        assert left in caplog.text and back in caplog.text.partition(left)[2]
    assert "gave no answer in 2 s" in caplog.text and str(ports[2]) not in caplog.text
    one, other = load_checkpoint(alone), load_checkpoint(pooled)
    assert one.step == other.step == STEPS
    for group, table in one.tensors.items():
        assert all(torch.equal(value, other.tensors[group][k]) for k, value in table.items())
    assert read_metrics(alone / "metrics.jsonl") == read_metrics(pooled / "metrics.jsonl")
