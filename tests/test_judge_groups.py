"""A judge that ranks: what it is shown and may answer, its place in training and nowhere else."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks_worker import finish, fork_server, start, train
from reward_servers import http, says, server
from rich.console import Console
from test_judge import answers, completion

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.method.policy import group_advantages
from tiltflow.rewards import load_reward
from tiltflow.rewards.combine import RewardMixture
from tiltflow.rewards.ranking import Groups, Ranker, WeightedRanker, ranked
from tiltflow.rewards.remote import client
from tiltflow.rewards.remote.loading import load_ranker
from tiltflow.tasks.train import run_training

NAME = "judge:some/model"
LEVELS = (0.2, 0.8, 0.5, 0.6, 0.1, 0.9)
IMAGES = torch.tensor(LEVELS).view(6, 1, 1, 1).expand(6, 3, 4, 4).contiguous()
PROMPTS = ["a cat"] * 3 + ["a dog"] * 3
STANDINGS = [0.0, 1.0, 0.5, 0.5, 0.0, 1.0]
"""Of `IMAGES` in two groups, by brightness."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("TILTFLOW_JUDGE_KEY", raising=False)


class Bright:
    """Likes bright images, whatever the order in which it is shown them."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def __call__(self, connection: socket.socket, body: bytes) -> None:
        asked = json.loads(body)
        with self.lock:
            self.asked.append(asked)
        means = brightness(asked)
        if asked["response_format"]["json_schema"]["name"] == "ranking":
            order = sorted(range(len(means)), key=lambda k: -means[k])
            said: object = {"ranking": [k + 1 for k in order]}
        else:
            first, second = means
            said = {"better": 0 if first == second else 1 if first > second else 2}
        connection.sendall(http(completion(json.dumps(said))))


def brightness(asked: dict[str, Any]) -> list[float]:
    """The means of the images in a question, in their order."""
    *pictures, _ = asked["messages"][0]["content"]
    files = [base64.b64decode(p["image_url"]["url"].partition(",")[2]) for p in pictures]
    return [float(np.asarray(Image.open(io.BytesIO(file))).mean()) for file in files]


def judge(place: Path, port: int, form: str, **options: object) -> Ranker:
    (place / "rubric.txt").write_text("Which shows {prompt}?")
    where = {"endpoint": f"http://127.0.0.1:{port}/v1", "cache": str(place / "kept")}
    given = {"rubric": str(place / "rubric.txt"), "timeout": 1.0, "retries": 1, "form": form}
    return load_ranker(NAME, {**given, **where, **options})


def turned(group: int, n: int) -> Sequence[int]:
    """An order in which the first comes last."""
    return [*range(1, n), 0] if group == 0 else range(n)


GROUPS = Groups(3, turned)


@pytest.mark.parametrize("form", ["group", "pairs"])
def test_images_stand_by_their_ranks_whatever_the_order(tmp_path: Path, form: str) -> None:
    stub = Bright()
    with server(stub) as port:
        one = judge(tmp_path, port, form, cache="off")
        plain = ranked(one, IMAGES, PROMPTS, Groups(3, lambda group, n: range(n)))
        stub.asked.clear()
        assert ranked(one, IMAGES, PROMPTS, GROUPS).tolist() == plain.tolist() == STANDINGS
    assert len(stub.asked) == (2 if form == "group" else 6)
    shown = [[round(x / 255, 1) for x in brightness(asked)] for asked in stub.asked]
    if form == "group":
        assert sorted(shown) == [[0.6, 0.1, 0.9], [0.8, 0.5, 0.2]]
    else:
        assert sorted(shown) == sorted(
            [[0.8, 0.5], [0.8, 0.2], [0.5, 0.2], [0.6, 0.1], [0.6, 0.9], [0.1, 0.9]]
        )
    for asked in stub.asked:
        text = asked["messages"][0]["content"][-1]["text"]
        assert text.startswith(("Which shows a cat?", "Which shows a dog?"))
        assert asked["temperature"] == 0


def test_a_tie_is_half_a_win(tmp_path: Path) -> None:
    images = torch.tensor([0.5, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    with server(Bright()) as port:
        found = ranked(judge(tmp_path, port, "pairs"), images, PROMPTS[:3], GROUPS)
    assert found.tolist() == [0.25, 0.25, 1.0]


def test_standings_are_advantages_at_once(tmp_path: Path) -> None:
    with server(Bright()) as port:
        one = judge(tmp_path, port, "group")
        mixture = RewardMixture([], [WeightedRanker(one, 2.0)])
        scores = {NAME: ranked(one, IMAGES, PROMPTS, GROUPS)}
    found, seen = group_advantages(scores, mixture.advantage_weights, 3)
    centred = torch.tensor(STANDINGS) - 0.5
    torch.testing.assert_close(found, centred / centred.std(unbiased=False), atol=1e-3, rtol=0)
    assert seen[f"policy/flat_groups/{NAME}"] == 0
    assert mixture.weights == {} and mixture.score(IMAGES, PROMPTS, [{}] * 6) == {}


def test_what_was_answered_is_not_asked_again_in_the_same_order(tmp_path: Path) -> None:
    stub = Bright()
    with server(stub) as port:
        first = ranked(judge(tmp_path, port, "group"), IMAGES, PROMPTS, GROUPS)
        again = ranked(judge(tmp_path, port, "group", parallel=1), IMAGES, PROMPTS, GROUPS)
        assert torch.equal(first, again) and len(stub.asked) == 2
        ranked(judge(tmp_path, port, "group"), IMAGES, PROMPTS, Groups(3, lambda g, n: range(n)))
        assert len(stub.asked) == 3  # one of the two groups was shown otherwise
        ranked(judge(tmp_path, port, "pairs"), IMAGES, PROMPTS, GROUPS)
        assert len(stub.asked) == 9
    assert torch.equal(ranked(judge(tmp_path, port, "group"), IMAGES, PROMPTS, GROUPS), first)


RANKINGS = {
    "prose": ("The second.", "not {.ranking"),
    "too few": ('{"ranking": [1, 2]}', "not each of 1 to 3 once"),
    "too many": ('{"ranking": [1, 2, 3, 3]}', "not each of 1 to 3 once"),
    "one twice": ('{"ranking": [1, 1, 3]}', "not each of 1 to 3 once"),
    "from 0": ('{"ranking": [0, 1, 2]}', "not each of 1 to 3 once"),
    "floats": ('{"ranking": [1.0, 2.0, 3.0]}', "not each of 1 to 3 once"),
    "true": ('{"ranking": [true, 2, 3]}', "not each of 1 to 3 once"),
    "texts": ('{"ranking": ["1", "2", "3"]}', "not each of 1 to 3 once"),
    "no list": ('{"ranking": "123"}', "not each of 1 to 3 once"),
    "more keys": ('{"ranking": [1, 2, 3], "why": ""}', "nothing else is wanted"),
    "a score": ('{"score": 3}', "an object with a ranking"),
    "nested": ("[" * 100_000, "not {.ranking"),
}
CHOICES = {
    "a third": ('{"better": 3}', "not 1, 2 or 0"),
    "true ": ('{"better": true}', "not 1, 2 or 0"),
    "null": ('{"better": null}', "not 1, 2 or 0"),
    "a float": ('{"better": 1.0}', "not 1, 2 or 0"),
    "a text": ('{"better": "1"}', "not 1, 2 or 0"),
}


@pytest.mark.parametrize("what", [*RANKINGS, *CHOICES])
def test_anything_but_a_rank_is_one_sentence_and_nothing_is_kept(what: str, tmp_path: Path) -> None:
    text, sentence = (RANKINGS | CHOICES)[what]
    form = "group" if what in RANKINGS else "pairs"
    with server(answers(text)) as port, pytest.raises(ValueError, match=sentence) as caught:
        ranked(judge(tmp_path, port, form), IMAGES, PROMPTS, GROUPS)
    assert str(caught.value).startswith(f"reward '{NAME}': 'a ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert not list((tmp_path / "kept").rglob("*.json"))


def test_a_kept_answer_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    with server(Bright()) as port:
        ranked(judge(tmp_path, port, "group"), IMAGES, PROMPTS, GROUPS)
        for kept in (tmp_path / "kept").rglob("*.json"):
            kept.write_text('{"ranking": [1, 1, 1]}')
        with pytest.raises(ValueError, match="is no ranking: delete it"):
            ranked(judge(tmp_path, port, "group"), IMAGES, PROMPTS, GROUPS)


def test_images_and_groups_are_looked_at_first(tmp_path: Path) -> None:
    one = judge(tmp_path, 1, "group")
    for images, prompts, groups, sentence in (
        (IMAGES * torch.nan, PROMPTS, GROUPS, "non-finite image"),
        (IMAGES, PROMPTS[:3], GROUPS, "3 prompts"),
        (IMAGES, PROMPTS, Groups(4, turned), "groups of two or more images of one prompt"),
        (IMAGES, PROMPTS, Groups(2, turned), "groups of two or more images of one prompt"),
        (IMAGES, PROMPTS, Groups(1, turned), "groups of two or more images of one prompt"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ranked(one, images, prompts, groups)


def test_a_ranker_is_no_reward(tmp_path: Path) -> None:
    """Under `rewards` of stage 2 and nowhere else: one sentence says so."""
    told = r"ranks the images of a group against each other \(option form group\), so no image"
    options = {"form": "group", "rubric": "r.txt"}
    with pytest.raises(ValueError, match=told):  # what evaluations and reward servers call
        load_reward(NAME, options=options)
    table = f"{{'{NAME}': {{weight: 1, options: {{form: group, rubric: r.txt}}}}}}"
    with pytest.raises(ValueError, match=told):
        load_config("demo_tilt", ["model.few_step=x", f"watch.rewards={table}"])
    chosen = load_config("demo_tilt", ["model.few_step=x", f"rewards={table}"])
    assert chosen.rewards[NAME].options["form"] == "group"
    with pytest.raises(ValueError, match="option form is 'groups'"):
        load_ranker(NAME, options | {"form": "groups"})
    with pytest.raises(ValueError, match="weight of reward"):
        WeightedRanker(judge(tmp_path, 1, "group"), float("nan"))


def settings(model: Path, place: Path, port: int, stage: str, *more: str) -> list[str]:
    values: dict[str, object] = {
        "model.path": model, "model.autocast": "null", "model.max_sequence_length": 8,
        "adapters.rank": 2, "data.prompts": place / "p.txt", "data.eval_prompts": place / "p.txt",
        "train.steps": 1 if stage == "cold_start" else 2, "train.batch_size": 4,
        "train.micro_batch_size": 2, "watch.rewards": "{}", "log.every": 1,
        "log.samples_every": 0, "run.device": "cpu", "checkpoint.every": 1,
    }  # fmt: skip
    if stage == "tilt":
        options = f"{{form: group, rubric: {place / 'rubric.txt'}, cache: 'off', timeout: 30,"
        options += f" endpoint: 'http://127.0.0.1:{port}/v1'}}"
        values |= {
            "tilt.group_size": 2, "tilt.policy_weight": 1.0, "model.few_step": place / "cold",
            "tilt.decode_chunk": 1, "rewards": f"{{'{NAME}': {{weight: 1, options: {options}}}}}",
        }  # fmt: skip
    return [*(f"{key}={value}" for key, value in values.items()), *more]


@pytest.mark.long
def test_two_ranks_are_one_and_a_resumed_run_is_an_uninterrupted_one(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\na cow\n")
    (tmp_path / "rubric.txt").write_text("Which shows {prompt}?")
    model, quiet = tiny_pipeline("sd35m"), Console(quiet=True)

    def run(stage: str, out: str, *more: str, port: int = 1) -> Path:
        chosen = settings(model, tmp_path, port, stage, f"run.out={tmp_path / out}", *more)
        return run_training(load_config(f"demo_{stage}", chosen), quiet)

    run("cold_start", "cold")
    stub = Bright()
    with server(stub) as port:
        whole = run("tilt", "whole", port=port)
        asked = sorted(json.dumps(one) for one in stub.asked)
        assert len(asked) == 4  # two groups in each of two iterations, each asked about once
        stub.asked.clear()
        run("tilt", "parts", "train.steps=1", port=port)
        parts = run("tilt", "parts", "run.resume=true", port=port)
        assert sorted(json.dumps(one) for one in stub.asked) == asked
        stub.asked.clear()
        chosen = settings(model, tmp_path, port, "tilt", f"run.out={tmp_path / 'two'}")
        ranks = start(fork_server(), 2, train, "demo_tilt", chosen, log=tmp_path / "log")
        assert finish(ranks) == [0, 0], (tmp_path / "log" / "0.txt").read_text()
        assert sorted(json.dumps(one) for one in stub.asked) == asked
    one, other, two = (load_checkpoint(out) for out in (whole, parts, tmp_path / "two"))
    for name, weights in one.tensors["generator"].items():
        assert torch.equal(weights, other.tensors["generator"][name])
        torch.testing.assert_close(weights, two.tensors["generator"][name], atol=1e-6, rtol=1e-4)
    rows = read_metrics(whole / "metrics.jsonl")
    assert rows == read_metrics(parts / "metrics.jsonl")
    assert f"reward/{NAME}" not in rows[0] and f"policy/flat_groups/{NAME}" in rows[0]
    split = [*chosen, f"run.out={tmp_path / 'split'}", "train.batch_size=6"]
    assert 0 not in finish(start(fork_server(), 2, train, "demo_tilt", split, log=tmp_path / "log"))
    said = (tmp_path / "log" / "0.txt").read_text()
    assert "ranks whole groups, but a train.batch_size of 6 gives 2 ranks no whole groups" in said


def test_an_endpoint_that_fails_is_never_a_rank(tmp_path: Path) -> None:
    with server(says(http(b"{}", "500 No"))) as port, pytest.raises(ValueError, match="2 attempts"):
        ranked(judge(tmp_path, port, "group"), IMAGES, PROMPTS, GROUPS)
