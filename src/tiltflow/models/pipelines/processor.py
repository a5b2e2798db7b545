"""A processor, which is for pictures too, as a pipeline of prompts alone needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.processing_utils import ProcessorMixin


class Silent:
    """In the place of a tokenizer where nothing is encoded."""

    def apply_chat_template(self, messages: object, **how: object) -> list[int]:
        return []

    def encode(self, text: str) -> list[int]:
        return [0]


class TextProcessor(ProcessorMixin):  # of this class, or diffusers would not take it
    """A tokenizer as a pipeline asks a processor: its own class may need torchvision, for pictures.

    A pipeline that looks for the length of its template in its constructor gets `Silent` where
    prompts are encoded already, and 0.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(  # type: ignore[override]
        self, messages: Sequence[Mapping[str, Any]], **how: Any
    ) -> list[list[int]]:
        """A conversation's tokens, as a batch of one."""
        return [self.tokenizer.apply_chat_template(messages, **how)]

    def __call__(self, text: list[str], **how: Any) -> Any:
        return self.tokenizer(text, **how)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **_: Any) -> None:
        self.tokenizer.save_pretrained(save_directory)
