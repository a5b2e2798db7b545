"""One question about images to a model behind OpenAI's chat completions, and its answer kept."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tiltflow.core.background import Background
from tiltflow.core.disk import parse_json, write_whole
from tiltflow.core.paths import embedding_cache, home_for_tilde
from tiltflow.core.sentences import printable
from tiltflow.rewards.remote.address import JUDGE
from tiltflow.rewards.remote.asking import (
    KEY_VARIABLE,
    PLACE,
    JudgeSettings,
    endpoint_of,
    read_rubric,
)
from tiltflow.rewards.remote.client import Client, Fault
from tiltflow.rewards.remote.wire import excerpt, given_token, parse, png

Value = TypeVar("Value")
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Form(Generic[Value]):
    """What an answer is to be: a JSON object with one `key` and nothing else.

    `example` is how one looks, `noun` what it is, `said` the sentence that asks for it, `schema`
    the value's, and `read` gives the value or raises a ValueError that says what is wrong.
    """

    key: str
    example: str
    noun: str
    said: str
    schema: dict[str, Any]
    read: Callable[[object], Value]

    def value(self, found: object) -> Value:
        """The value of a parsed answer.

        Raises:
            ValueError: if it is anything else.
        """
        if not isinstance(found, dict) or list(found) != [self.key]:
            raise ValueError(f"an object with a {self.key} and nothing else is wanted")
        return self.read(found[self.key])


@dataclass(frozen=True)
class Question(Generic[Value]):
    """`pictures` (H, W, 3) uint8 of `prompt` in the order in which they are shown.

    `facts` are what the answer depends on besides the model and the rubric, as JSON.
    """

    prompt: str
    pictures: Sequence[Pixels]
    form: Form[Value]
    facts: list[Any]


class Endpoint:
    """A judge's model, its rubric and the answers that are kept.

    Raises:
        ValueError: if the rubric cannot be used.
    """

    def __init__(self, name: str, settings: JudgeSettings) -> None:
        self.name, self.settings = name, settings
        self.model = name.removeprefix(JUDGE)
        self.rubric = read_rubric(name, settings.rubric)
        self.cache = _cache(settings.cache)
        where = endpoint_of(name, settings.endpoint)
        start = f"start the endpoint of {self.model}"
        key = functools.partial(given_token, KEY_VARIABLE)
        self._path = f"{where.name}/chat/completions"
        self._client = Client(where, settings.client(), start, key, KEY_VARIABLE)

    def answers(self, questions: Sequence[Question[Value]]) -> list[Value]:
        """The answer to each, `settings.parallel` asked at a time.

        Raises:
            ValueError: if the endpoint refuses, stays away for longer than `patience`, or gives no
                answer of the form after `retries` more attempts.
            Stopped: if the run is asked to stop while it waits.
        """
        count = min(self.settings.parallel, len(questions))
        threads = [Background(f"{self.name} {number}") for number in range(count)]
        try:
            asked = [
                threads[row % count].call(self._answer, question)
                for row, question in enumerate(questions)
            ]
            return [future.result() for future in asked]
        finally:
            for thread in threads:
                thread.close()

    def _answer(self, question: Question[Value]) -> Value:
        if self.cache is None:
            return question.form.value(self._ask(question))
        key = hashlib.sha256(json.dumps(question.facts).encode()).hexdigest()
        file = self.cache / key[:2] / f"{key}.json"
        if not file.is_file():
            found = self._ask(question)
            # Two runs may ask the same at once: each writes a file of its own, the first is kept.
            part = file.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}")
            write_whole(part, json.dumps(found) + "\n")
            with suppress(FileExistsError):
                os.link(part, file)
            part.unlink()
        try:
            return question.form.value(parse_json(file.read_bytes()))
        except (OSError, ValueError) as error:
            noun = question.form.noun
            raise ValueError(f"the kept answer {file} is no {noun}: delete it") from error

    def _ask(self, question: Question[Value]) -> object:
        """An answer that has the question's form, parsed."""
        body = json.dumps(self._request(question)).encode()
        read = functools.partial(_read, question.form)
        ask = functools.partial(self._client.exchange, "POST", self._path, body, read)
        try:
            found: object = self._client.insist(ask, self.settings.patience)
        except ValueError as error:
            raise ValueError(f"{printable(repr(question.prompt))}: {error}") from error
        return found

    def _request(self, question: Question[Value]) -> dict[str, Any]:
        form = question.form
        text = f"{self.rubric.replace(PLACE, question.prompt)}\n\n{form.said}"
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(pixels)}"}}
            for pixels in question.pictures
        ]
        schema = {
            "type": "object",
            "properties": {form.key: form.schema},
            "required": [form.key],
            "additionalProperties": False,
        }
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": self.settings.tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": form.key, "schema": schema, "strict": True},
            },
        }


def _read(form: Form[Any], body: bytes) -> object:
    """The parsed answer, which has the form; what has not may be asked for once more.

    Raises:
        Fault: if the answer is no chat completion, was cut off, or holds anything else.
    """
    try:
        answer = parse(body)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise Fault(f"answered as no chat completion does: {excerpt(body)}") from None
    if choice.get("finish_reason") not in ("stop", None):
        reason = printable(repr(choice["finish_reason"]), 40)
        raise Fault(f"ended its answer by {reason}, not by itself")
    try:
        found: object = parse(str(text).strip().encode())
        form.value(found)
    except ValueError as error:
        said = printable(repr(text), 60)
        raise Fault(f"answered {said}, which is not {form.example}: {error}") from None
    return found


def seen(pixels: Pixels) -> str:
    """What stands for an image's pixels among a question's facts."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _cache(setting: str | None) -> Path | None:
    """Where answers are kept: a folder, the user's own (None; beside the embeddings), or nowhere
    ("off")."""
    if setting == "off":
        return None
    if setting is not None:
        return Path(home_for_tilde(setting))
    own = embedding_cache(None)
    assert own is not None
    return own.parent / "judge"
