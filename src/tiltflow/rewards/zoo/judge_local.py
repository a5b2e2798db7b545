"""Questions about images to a vision-language model that runs here, by transformers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from tiltflow.core.disk import sha256
from tiltflow.core.paths import resolve_path
from tiltflow.core.sentences import first_sentence, printable
from tiltflow.models.pipelines.fingerprint import content_digest
from tiltflow.rewards.questions import Form, Kept, Question
from tiltflow.rewards.remote.asking import JudgeSettings, read_rubric, require_guide
from tiltflow.rewards.weights import absent, dtype_of, frozen, load_pretrained

Value = TypeVar("Value")

WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As the forms' examples have it, and no more."""


class LocalModel:
    """A judge's model at `path`, a directory or hub id, on `device`.

    Answers are the likeliest tokens one after another (greedy) among those that the form's JSON
    schema allows, as endpoints decode it too. It is asked one question at a time, so an answer
    depends on its question alone.

    Raises:
        ValueError: if the package llguidance is not installed, the rubric cannot be used, there is
            no such model at `path`, or its processor needs a package that is not installed or has
            no chat template.
    """

    elsewhere = False

    def __init__(
        self, name: str, settings: JudgeSettings, path: str, device: str | torch.device
    ) -> None:
        self.settings, self.device = settings, torch.device(device)
        require_guide(name)
        import llguidance.hf

        self._guide: Any = llguidance
        self.rubric = read_rubric(name, settings.rubric)
        self._kept = Kept(settings.cache)
        try:
            self.processor = _processor(path)
            dtype = dtype_of(settings.dtype)
            kind: Any = AutoModelForImageTextToText
            loaded = load_pretrained(kind, path, "vision-language model", dtype)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        self.model: Any = frozen(loaded, device, dtype)
        tokenizer = self.processor.tokenizer
        self._ends = _ends(self.model, tokenizer)
        _decode_greedily(self.model, self._ends, settings.tokens)
        self._tokens = self._guide.hf.from_tokenizer(tokenizer, eos_token=self._ends)
        self._special = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        )
        self.identity: object = _identity(path, settings.dtype, self.device)

    def answers(self, questions: Sequence[Question[Value]]) -> list[Value]:
        """The answer to each, one after another.

        Raises:
            ValueError: naming the prompt, if one is not of its form or longer than `tokens`, or if
                the prompt holds one of the model's special tokens.
        """
        return [
            self._kept.answer(question, functools.partial(self._ask, question))
            for question in questions
        ]

    def _ask(self, question: Question[Any]) -> object:
        try:
            return self._asked(question)
        except ValueError as error:
            raise ValueError(f"{printable(repr(question.prompt))}: {error}") from error

    @torch.no_grad()
    def _asked(self, question: Question[Any]) -> object:
        """An answer that has the question's form, parsed."""
        inputs = self._inputs(question)
        told = inputs["input_ids"].shape[1]
        held = Held(self._matcher(question.form), told)
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.model.generate(**inputs, logits_processor=LogitsProcessorList([held]))
        answer = tokens[0, told:].tolist()
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        if answer[-1] not in self._ends:
            said, most = printable(repr(text), 60), self.settings.tokens
            raise ValueError(f"the model's answer {said} was cut off after {most} tokens")
        try:
            return question.form.parsed(text)
        except ValueError as error:
            raise ValueError(f"the model {error}") from None

    def _inputs(self, question: Question[Any]) -> Any:
        text = question.text(self.rubric)
        sign = next((sign for sign in self._special if sign in text), None)
        if sign is not None:
            raise ValueError(f"the question holds {sign!r}, a special token of the model")
        pictures = [
            {"type": "image", "image": Image.fromarray(pixels)} for pixels in question.pictures
        ]
        turn = {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
        inputs = self.processor.apply_chat_template(
            [turn],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self.device, self.model.dtype)

    def _matcher(self, form: Form[Any]) -> Any:
        """What says which tokens may come next, at the beginning of an answer."""
        matcher = self._guide.LLMatcher
        grammar = matcher.grammar_from_json_schema(form.json_schema, overrides=WHITE_SPACE)
        return matcher(self._tokens, grammar)


class Held(LogitsProcessor):
    """Leaves the tokens (V,) that a matcher allows, for one sequence whose answer begins at the
    token `at`."""

    def __init__(self, matcher: Any, at: int) -> None:
        self.matcher, self.at = matcher, at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fresh = input_ids[0, self.at :].tolist()
        self.at += len(fresh)
        self.matcher.consume_tokens(fresh)
        assert not self.matcher.is_error(), self.matcher.get_error()
        bias = np.frombuffer(self.matcher.compute_logit_bias(), dtype=np.uint8)
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)  # a head may be wider than words
        known = min(len(bias), len(allowed))
        allowed[:known] = torch.from_numpy(bias[:known] > 0)
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def _processor(path: str) -> Any:
    """The processor at `path`, with a fast tokenizer and a chat template."""
    try:
        processor: Any = AutoProcessor.from_pretrained(resolve_path(path))
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ValueError(
            f"the processor at {path!r} needs the package torchvision: pip install torchvision"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(absent("processor", path, error)) from error
    except Exception as error:  # whatever a configuration can make of the library
        raise ValueError(
            f"the processor at {path!r} cannot be loaded ({first_sentence(error)})"
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ValueError(f"the processor at {path!r} is not one of images and text")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {path!r} is not a fast one with an end of sequence")
    if processor.chat_template is None:
        raise ValueError(f"the processor at {path!r} has no chat template")
    return processor


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer; without a model's own, the tokenizer's."""
    own = model.generation_config.eos_token_id
    if own is None:
        return [tokenizer.eos_token_id]
    return own if isinstance(own, list) else [own]


def _decode_greedily(model: Any, ends: list[int], tokens: int) -> None:
    """In place of the model's own settings, which may sample, or hold a repeated digit against an
    answer."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=ends, pad_token_id=ends[0]
    )


def _identity(path: str, dtype: str, device: torch.device) -> object:
    """What stands for the model among a question's facts: the contents of its files, and what its
    rounding depends on."""
    folder = Path(resolve_path(path))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, local_files_only=True))
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name} {sha256(file)}\n".encode())
        elif file.suffix == ".safetensors":
            digest.update(f"{file.name} {content_digest(file)}\n".encode())
    versions = [version("torch"), version("transformers")]
    return [digest.hexdigest(), dtype, device.type, *versions]
