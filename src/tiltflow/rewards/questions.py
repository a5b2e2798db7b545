"""Questions about images to a vision-language model, wherever it is, and its answers kept."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tiltflow.core.disk import parse_json, write_whole
from tiltflow.core.paths import embedding_cache, home_for_tilde
from tiltflow.core.sentences import printable
from tiltflow.rewards.remote.asking import PLACE
from tiltflow.rewards.remote.wire import parse

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

    @property
    def json_schema(self) -> dict[str, Any]:
        """The answer's JSON schema."""
        return {
            "type": "object",
            "properties": {self.key: self.schema},
            "required": [self.key],
            "additionalProperties": False,
        }

    def value(self, found: object) -> Value:
        """The value of a parsed answer.

        Raises:
            ValueError: if it is anything else.
        """
        if not isinstance(found, dict) or list(found) != [self.key]:
            raise ValueError(f"an object with a {self.key} and nothing else is wanted")
        return self.read(found[self.key])

    def parsed(self, text: object) -> object:
        """An answer's text, parsed; it has the form.

        Raises:
            ValueError: quoting its beginning, if it has not.
        """
        try:
            found: object = parse(str(text).strip().encode())
            self.value(found)
        except ValueError as error:
            said = printable(repr(text), 60)
            raise ValueError(f"answered {said}, which is not {self.example}: {error}") from None
        return found


@dataclass(frozen=True)
class Question(Generic[Value]):
    """`pictures` (H, W, 3) uint8 of `prompt` in the order in which they are shown.

    `facts` are what the answer depends on besides the model and the rubric, as JSON.
    """

    prompt: str
    pictures: Sequence[Pixels]
    form: Form[Value]
    facts: list[Any]

    def text(self, rubric: str) -> str:
        """What stands beside the pictures."""
        return f"{rubric.replace(PLACE, self.prompt)}\n\n{self.form.said}"


class Model(Protocol):
    """A model that is asked. `identity` is what stands for it among a question's facts, as JSON;
    `elsewhere` says that another process computes, so that this one can go on meanwhile."""

    identity: object
    rubric: str
    elsewhere: bool

    def answers(self, questions: Sequence[Question[Value]]) -> list[Value]: ...


class Kept:
    """Answers in a folder, by the digest of their questions' facts.

    `setting` is the folder, None the user's own (beside the embeddings), "off" none.
    """

    def __init__(self, setting: str | None) -> None:
        self.folder: Path | None = None
        if setting is None:
            own = embedding_cache(None)
            assert own is not None
            self.folder = own.parent / "judge"
        elif setting != "off":
            self.folder = Path(home_for_tilde(setting))

    def answer(self, question: Question[Value], ask: Callable[[], object]) -> Value:
        """The kept answer, or the one that `ask` gives, parsed, which is then kept.

        Raises:
            ValueError: as `ask`, or if what was kept has not the question's form.
        """
        if self.folder is None:
            return question.form.value(ask())
        key = hashlib.sha256(json.dumps(question.facts).encode()).hexdigest()
        file = self.folder / key[:2] / f"{key}.json"
        if not file.is_file():
            found = ask()
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


def seen(pixels: Pixels) -> str:
    """What stands for an image's pixels among a question's facts."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()
