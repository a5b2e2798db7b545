"""Questions about images to a model behind OpenAI's chat completions."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from tiltflow.core.background import Background
from tiltflow.core.sentences import printable
from tiltflow.rewards.questions import Form, Kept, Question
from tiltflow.rewards.remote.address import JUDGE
from tiltflow.rewards.remote.asking import KEY_VARIABLE, JudgeSettings, endpoint_of, read_rubric
from tiltflow.rewards.remote.client import Client, Fault
from tiltflow.rewards.remote.wire import excerpt, given_token, parse, png

Value = TypeVar("Value")


class Endpoint:
    """A judge's model behind an endpoint, its rubric and the answers that are kept.

    Raises:
        ValueError: if the rubric cannot be used.
    """

    elsewhere = True

    def __init__(self, name: str, settings: JudgeSettings) -> None:
        self.name, self.settings = name, settings
        self.identity: object = name.removeprefix(JUDGE)
        self.rubric = read_rubric(name, settings.rubric)
        self._kept = Kept(settings.cache)
        where = endpoint_of(name, settings.endpoint)
        start = f"start the endpoint of {self.identity}"
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
        return self._kept.answer(question, functools.partial(self._ask, question))

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
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(pixels)}"}}
            for pixels in question.pictures
        ]
        content = [*pictures, {"type": "text", "text": question.text(self.rubric)}]
        return {
            "model": self.identity,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.settings.tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": form.key, "schema": form.json_schema, "strict": True},
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
        return form.parsed(text)
    except ValueError as error:
        raise Fault(str(error)) from None
