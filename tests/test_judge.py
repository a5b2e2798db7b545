"""A judge behind an endpoint: what it is asked and may answer, what is kept and hidden."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_servers import Reply, http, says, server, trickles

from tiltflow.config.load import load_config
from tiltflow.core.interruption import Stopped, interruptible
from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.base import Reward
from tiltflow.rewards.remote import client

KEY = "a-key-that-nobody-sees"
IMAGES = torch.linspace(0, 1, 3 * 3 * 8 * 8).view(3, 3, 8, 8)
PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("TILTFLOW_JUDGE_KEY", raising=False)


def completion(text: object, reason: object = "stop") -> bytes:
    choice = {"index": 0, "finish_reason": reason, "message": {"content": text}}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def answers(text: object, reason: object = "stop") -> Reply:
    return says(http(completion(text, reason)))


class Stub:
    """Answers a score by the length of the question's text, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def __call__(self, connection: socket.socket, body: bytes) -> None:
        asked = json.loads(body)
        with self.lock:
            self.asked.append(asked)
        text = asked["messages"][0]["content"][1]["text"]
        score = 7.5 if "dog" in text else 3
        connection.sendall(http(completion(json.dumps({"score": score}))))


def judge(place: Path, port: int, **options: object) -> Reward:
    rubric = place / "rubric.txt"
    if not rubric.exists():
        rubric.write_text("Does it show {prompt}?")
    where = {"endpoint": f"http://127.0.0.1:{port}/v1", "cache": str(place / "kept")}
    more = {"timeout": 0.4, "retries": 1, **where, **options}
    return load_reward("judge:some/model", options={"rubric": str(rubric), **more})


def scored(reward: Reward, prompts: Sequence[str] = PROMPTS) -> list[float]:
    return checked(reward, IMAGES[: len(prompts)], prompts, [{}] * len(prompts)).tolist()


def test_it_is_asked_one_image_with_the_rubric_and_the_prompt(tmp_path: Path) -> None:
    stub = Stub()
    with server(stub) as port:
        assert scored(judge(tmp_path, port)) == [3, 7.5, 3]
    texts = [one["messages"][0]["content"][1]["text"] for one in stub.asked]
    assert sorted(text.splitlines()[0] for text in texts) == [
        "Does it show a cat?", "Does it show a cat?", "Does it show a dog?",
    ]  # fmt: skip
    for one in stub.asked:
        assert (one["model"], one["temperature"]) == ("some/model", 0)
        assert one["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;b")
        assert one["response_format"]["json_schema"]["schema"]["required"] == ["score"]


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    stub = Stub()
    with server(stub) as port:
        first = scored(judge(tmp_path, port))
        assert scored(judge(tmp_path, port, parallel=1)) == first and len(stub.asked) == 3
        scored(judge(tmp_path, port), ["a cat", "a cat"])  # the second image, of another prompt
        assert len(stub.asked) == 4
        scored(judge(tmp_path, port, high=8), ["a cat"])
        assert len(stub.asked) == 5
        (tmp_path / "rubric.txt").write_text("Is {prompt} pretty?")
        scored(judge(tmp_path, port), ["a cat"])
        assert len(stub.asked) == 6
        scored(judge(tmp_path, port, cache="off"), ["a cat"])
        assert len(stub.asked) == 7
    # with everything kept, nobody needs to be there
    assert scored(judge(tmp_path, port), ["a cat"]) == [3]


def test_a_kept_answer_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    with server(answers('{"score": 4}')) as port:
        assert scored(judge(tmp_path, port), ["a cat"]) == [4]
        (kept,) = (tmp_path / "kept").rglob("*.json")
        for wrong in ("", "{}", '{"score": 11}', '{"score": NaN}', "[" * 5000):
            kept.write_text(wrong)
            with pytest.raises(ValueError, match="is no score: delete it"):
                scored(judge(tmp_path, port), ["a cat"])


STRICT: dict[str, tuple[Reply, str]] = {
    "a bare number": (answers("7"), "an object with a score"),
    "prose": (answers("I would say 7 of 10."), "not {.score.: N}"),
    "a fence": (answers('```json\n{"score": 7}\n```'), "not {.score.: N}"),
    "two": (answers('{"score": 7} {"score": 8}'), "not {.score.: N}"),
    "more keys": (answers('{"score": 7, "why": "x"}'), "nothing else is wanted"),
    "a text": (answers('{"score": "7"}'), "the score is no number"),
    "true": (answers('{"score": true}'), "the score is no number"),
    "null": (answers('{"score": null}'), "the score is no number"),
    "too high": (answers('{"score": 11}'), "not from 1 to 10"),
    "too low": (answers('{"score": 0}'), "not from 1 to 10"),
    "nan": (answers('{"score": NaN}'), "not from 1 to 10|not {.score"),
    "endless": (answers('{"score": Infinity}'), "not from 1 to 10|not {.score"),
    "400 digits": (answers('{"score": %s}' % ("9" * 400)), "not from 1 to 10"),
    "nested": (answers("[" * 100_000), "not {.score"),
    "escapes": (answers("\x1b[2J\x07"), r"\\x1b"),
    "no content": (answers(None), "not {.score"),
    "nothing": (answers(""), "not {.score"),
    "a list of contents": (answers([{"type": "text"}]), "not {.score"),
    "cut off": (answers('{"score": 1}', "length"), "ended its answer by 'length'"),
    "filtered": (answers('{"score": 1}', "content_filter"), "ended its answer by"),
    "an odd reason": (answers('{"score": 1}', {"a": "\x1b"}), "ended its answer by"),
    "no choices": (says(http(b'{"choices": []}')), "no chat completion"),
    "choices are text": (says(http(b'{"choices": "abc"}')), "no chat completion"),
    "a choice is text": (says(http(b'{"choices": ["abc"]}')), "no chat completion"),
    "a list": (says(http(b"[]")), "no chat completion"),
    "html": (says(http(b"<html>")), "no chat completion"),
    "no utf-8": (says(http(b"\xff\xfe")), "no chat completion"),
    "a redirect": (says(http(b"", "302 Found")), "a redirect, which is not followed"),
    "no such model": (says(http(b'{"error": {"message": "no model"}}', "404 No")), "404: no model"),
    "overloaded": (says(http(b'{"error": {"message": "out"}}', "500 No")), "failed: out"),
    "a key is wanted": (says(http(b"{}", "401 No")), "set TILTFLOW_JUDGE_KEY"),
    "a terabyte": (says(http(b"", length=10**12)), "announced 1000000000000 bytes"),
    "a drip": (trickles, r"no answer in 0\.4 s"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRICT)
def test_anything_but_a_score_is_one_sentence_and_nothing_is_kept(
    what: str, tmp_path: Path
) -> None:
    reply, sentence = STRICT[what]
    with server(reply) as port, pytest.raises(ValueError, match=sentence) as caught:
        scored(judge(tmp_path, port), ["a cat"])
    assert str(caught.value).startswith("reward 'judge:some/model': 'a cat': http://127.0.0.1:")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert not list((tmp_path / "kept").rglob("*.json"))


def test_a_second_attempt_may_succeed(tmp_path: Path) -> None:
    turns = iter([answers("seven"), answers('{"score": 7}')])
    with server(lambda connection, body: next(turns)(connection, body)) as port:
        assert scored(judge(tmp_path, port), ["a cat"]) == [7]


def test_one_that_is_away_is_waited_for(tmp_path: Path) -> None:
    busy = says(http(b"", "503 Busy"))
    turns = iter([busy, answers('{"score": 7}')])
    with server(lambda connection, body: next(turns)(connection, body)) as port:
        assert scored(judge(tmp_path, port, retries=0), ["a cat"]) == [7]
    with pytest.raises(ValueError, match="start the endpoint of some/model"):
        scored(judge(tmp_path, port, patience=0.05), ["a dog"])
    with interruptible() as asked:
        asked.set()
        with pytest.raises(Stopped):
            scored(judge(tmp_path, port), ["a dog"])


def test_the_key_is_sent_and_seen_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TILTFLOW_JUDGE_KEY", KEY)
    echo = json.dumps({"error": {"message": f"the key {KEY} is unknown"}}).encode()
    for status in ("401 No", "500 No", "400 No"):
        with server(says(http(echo, status))) as port, pytest.raises(ValueError) as caught:
            scored(judge(tmp_path, port), ["a cat"])
        assert KEY not in str(caught.value) and "[...]" in str(caught.value)
    with server(answers(f"I know {KEY}")) as port, pytest.raises(ValueError) as caught:
        scored(judge(tmp_path, port), ["a cat"])
    assert KEY not in str(caught.value) + caplog.text
    monkeypatch.setenv("TILTFLOW_JUDGE_KEY", "two words")
    with server(Stub()) as port, pytest.raises(ValueError, match="TILTFLOW_JUDGE_KEY must be"):
        scored(judge(tmp_path, port), ["a dog"])


def test_a_config_is_refused_for_a_wrong_option() -> None:
    def load(options: str, name: str = "judge:m") -> None:
        rewards = f"rewards={{'{name}': {{weight: 1, options: {options}}}}}"
        load_config("demo_tilt", ["model.few_step=x", rewards])

    load("{rubric: r.txt}")
    for options, sentence in {
        "{}": "needs the option rubric",
        "{rubrik: r.txt}": "has no option 'rubrik'; did you mean 'rubric'",
        "{rubric: 3}": "option rubric is 3",
        "{rubric: r.txt, low: 10}": "option low is 10, which is not below high 10",
        "{rubric: r.txt, endpoint: 'ftp://host/v1'}": "option endpoint is to be host, port",
        "{rubric: r.txt, endpoint: 'http://me:secret@host/v1'}": "has a user, password or token",
        "{rubric: r.txt, api_key: secret}": "looks like a secret",
    }.items():
        with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
            load(options)
        assert "me:secret" not in str(caught.value)
    with pytest.raises(ValueError, match="names no model"):
        load("{rubric: r.txt}", "judge:")


def test_a_rubric_says_where_the_prompt_goes(tmp_path: Path) -> None:
    file = tmp_path / "r.txt"
    for content, sentence in {
        b"no place": "must hold {prompt}",
        b"\xff": "cannot be read",
        b"{prompt}" + b"x" * 70_000: "has over 65536 bytes",
    }.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            judge(tmp_path, 1, rubric=str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        judge(tmp_path, 1, rubric=str(tmp_path / "none"))


def test_the_judge_needs_no_weights_and_is_elsewhere(tmp_path: Path) -> None:
    from tiltflow.rewards.base import at_once_of
    from tiltflow.rewards.sizes import reward_memory

    reward = judge(tmp_path, 1)
    assert reward.elsewhere and not reward.differentiable and at_once_of(reward) is None
    options = type("R", (), {"path": None, "options": {}})()
    assert reward_memory({"judge:m": options}) == {"judge:m": 0}
