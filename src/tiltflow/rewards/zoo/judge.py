"""A vision-language model that is asked how good an image is: `judge:MODEL`.

It is behind an endpoint that speaks OpenAI's chat completions, as vLLM, SGLang and llama.cpp's
server do. It sees one image at a time, with the rubric and the prompt, so a score is of its image
and prompt alone. (Ranks within a group would not be; they are not offered.)
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltflow.core.background import Background
from tiltflow.core.disk import parse_json, write_whole
from tiltflow.core.paths import embedding_cache, home_for_tilde
from tiltflow.core.sentences import printable
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.remote.address import JUDGE
from tiltflow.rewards.remote.asking import (
    KEY_VARIABLE,
    PLACE,
    JudgeSettings,
    endpoint_of,
    read_rubric,
)
from tiltflow.rewards.remote.client import Client, Fault
from tiltflow.rewards.remote.wire import eight_bits, excerpt, given_token, parse, png

FORMAT = "tiltflow-judge-1"


class Judge:
    """What the model says of each image, from `low` to `high`; not differentiable.

    Images are rounded to eight bits. The key, where the endpoint asks for one, is read from the
    environment variable TILTFLOW_JUDGE_KEY. An answer is kept by the image, the prompt, the rubric
    and the model, so the same is never asked twice.

    Raises:
        ValueError: if the rubric cannot be used; each call, if the endpoint refuses, stays away for
            longer than `patience`, or gives no score after `retries` more attempts.
        Stopped: by a call, if the run is asked to stop while it waits.
    """

    differentiable = False
    domain = "images"
    elsewhere = True

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

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        threads = [
            Background(f"{self.name} {number}")
            for number in range(min(self.settings.parallel, len(prompts)))
        ]
        try:
            asked = [
                threads[row % len(threads)].call(self._score, pixels, prompt)
                for row, (pixels, prompt) in enumerate(
                    zip(eight_bits(images), prompts, strict=True)
                )
            ]
            scores = [future.result() for future in asked]
        finally:
            for thread in threads:
                thread.close()
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, pixels: np.ndarray, prompt: str) -> float:
        """The score of one image (H, W, 3) uint8."""
        if self.cache is None:
            return self._ask(pixels, prompt)
        key = self._key(pixels, prompt)
        file = self.cache / key[:2] / f"{key}.json"
        if file.is_file():
            return self._kept(file)
        score = self._ask(pixels, prompt)
        # Two runs may ask the same at once: each writes a file of its own, the first is kept.
        part = file.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}")
        write_whole(part, json.dumps({"score": score}) + "\n")
        with suppress(FileExistsError):
            os.link(part, file)
        part.unlink()
        return self._kept(file)

    def _key(self, pixels: np.ndarray, prompt: str) -> str:
        seen = hashlib.sha256(pixels.tobytes()).hexdigest()
        limits = [self.settings.low, self.settings.high]
        facts = [FORMAT, self.model, self.rubric, limits, prompt, list(pixels.shape), seen]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _kept(self, file: Path) -> float:
        try:
            return self._number(parse_json(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise ValueError(f"the kept answer {file} is no score: delete it") from error

    def _ask(self, pixels: np.ndarray, prompt: str) -> float:
        body = json.dumps(self._request(png(pixels), prompt)).encode()
        ask = functools.partial(self._client.exchange, "POST", self._path, body, self._read)
        try:
            score: float = self._client.insist(ask, self.settings.patience)
        except ValueError as error:
            raise ValueError(f"{printable(repr(prompt))}: {error}") from error
        return score

    def _request(self, picture: str, prompt: str) -> dict[str, Any]:
        low, high = self.settings.low, self.settings.high
        form = f'Answer with JSON alone: {{"score": N}}, N a number from {low:g} to {high:g}.'
        text = f"{self.rubric.replace(PLACE, prompt)}\n\n{form}"
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        schema = {
            "type": "object",
            "properties": {"score": {"type": "number", "minimum": low, "maximum": high}},
            "required": ["score"],
            "additionalProperties": False,
        }
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": self.settings.tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "score", "schema": schema, "strict": True},
            },
        }

    def _read(self, body: bytes) -> float:
        """The score in an answer; what is none may be asked for once more.

        Raises:
            Fault: if the answer is no chat completion, was cut off, or holds anything but a score.
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
            return self._number(parse(str(text).strip().encode()))
        except ValueError as error:
            said = printable(repr(text), 60)
            raise Fault(f'answered {said}, which is not {{"score": N}}: {error}') from None

    def _number(self, found: object) -> float:
        if not isinstance(found, dict) or list(found) != ["score"]:
            raise ValueError("an object with a score and nothing else is wanted")
        score, low, high = found["score"], self.settings.low, self.settings.high
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ValueError("the score is no number")
        if not low <= score <= high or not math.isfinite(score):
            raise ValueError(f"the score is not from {low:g} to {high:g}")
        return float(score)


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
