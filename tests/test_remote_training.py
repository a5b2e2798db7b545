"""A run whose reward server dies: it waits, or is stopped and resumed, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from reward_servers import http, says, server
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.rewards.remote import client as remote
from tiltflow.rewards.remote import wire
from tiltflow.tasks.train import run_training

STEPS = 3
QUIET = Console(quiet=True)


HEALTH_OF_ONE = b'{"rewards": {"mean": {"differentiable": false, "contents": "c0"}}}'


class Mortal:
    """A server of the reward `mean` that dies after `lives` requests, until it is raised."""

    def __init__(self, port: int, lives: int) -> None:
        self.port, self.lives, self.asked = port, lives, 0
        self.died = threading.Event()
        self._open = ExitStack()
        self.raise_up()

    def raise_up(self) -> None:
        self._open.enter_context(server(self._score, self.port, says(http(HEALTH_OF_ONE))))

    def _score(self, connection: socket.socket, body: bytes) -> None:
        self.asked += 1
        images, _, _ = wire.decode_batch(body)
        said = {"scores": images.mean((1, 2, 3)).tolist(), "contents": "c0"}
        connection.sendall(http(json.dumps(said).encode()))
        if self.asked == self.lives:
            threading.Thread(target=self._die).start()

    def _die(self) -> None:
        self.close()
        self.died.set()

    def close(self) -> None:
        self._open.close()


def settings(model: Path, folder: Path, stage: str, port: int) -> list[str]:
    values = {
        "model.path": model, "model.autocast": "null", "model.max_sequence_length": 8,
        "adapters.rank": 2, "data.prompts": folder / "p.txt", "data.eval_prompts": folder / "p.txt",
        "train.steps": 1 if stage == "cold_start" else STEPS, "train.batch_size": 2,
        "watch.rewards": "{}", "log.every": 1, "log.samples_every": 0, "run.device": "cpu",
    }  # fmt: skip
    if stage == "tilt":
        name = f"remote:http://127.0.0.1:{port}/mean"
        values |= {
            "tilt.group_size": 2, "model.few_step": folder / "cold_start",
            "rewards": f"{{'{name}': {{weight: 1.0, options: {{timeout: 30, retries: 0}}}}}}",
        }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.long
def test_a_server_that_dies_costs_a_run_nothing(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.1)
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def train(stage: str, out: str, *more: str) -> Path:
        chosen = settings(tiny_pipeline("sd35m"), tmp_path, stage, port)
        return run_training(
            load_config(f"demo_{stage}", [*chosen, f"run.out={tmp_path / out}", *more]), QUIET
        )

    train("cold_start", "cold_start")
    alive = Mortal(port, lives=99)
    whole = train("tilt", "whole")
    alive.close()
    assert alive.asked == STEPS
    kept = load_checkpoint(whole).state["manifest"]["rewards"]
    assert kept == {"mean server": "c0"}  # so a resume says if it is another

    dying = Mortal(port, lives=2)

    def raise_later() -> None:
        dying.died.wait()
        time.sleep(0.5)
        dying.raise_up()

    helper = threading.Thread(target=raise_later)
    helper.start()
    waited = train("tilt", "waited")
    helper.join()
    dying.close()
    assert_equal(whole, waited)

    dead = Mortal(port, lives=2)

    def stop() -> None:
        dead.died.wait()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    stopped = train("tilt", "stopped")
    assert latest_step(stopped) == 2
    dead.raise_up()
    train("tilt", "stopped", "run.resume=true")
    dead.close()
    assert_equal(whole, stopped)


def assert_equal(a: Path, b: Path) -> None:
    one, other = load_checkpoint(a), load_checkpoint(b)
    assert one.step == other.step == STEPS and one.tensors.keys() == other.tensors.keys()
    for group, table in one.tensors.items():
        assert all(torch.equal(value, other.tensors[group][k]) for k, value in table.items())
    assert read_metrics(a / "metrics.jsonl") == read_metrics(b / "metrics.jsonl")
