"""What prompts need: packages that they go through, and of a processor, which is for pictures too,
its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from tiltflow.core.sentences import first_sentence
from tiltflow.models.family import Family
from tiltflow.models.pipelines.directory import Pipeline, is_part


def check_text_packages(family: Family) -> None:
    """That what a family's pipeline does to prompts where it can is done here.

    Raises:
        ValueError: naming the package that is not installed.
    """
    for package in family.text_packages:
        if find_spec(package) is None:
            raise ValueError(
                f"prompts of {family.title} go through {package}, without which some have other "
                f"tokens: pip install {package}"
            )


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


def processors_of(pipeline: Pipeline, silent: bool) -> dict[str, TextProcessor]:
    """The processors of a pipeline by the parts' names; `silent` reads no tokenizer.

    Raises:
        ValueError: if a tokenizer cannot be loaded.
    """
    parts = [n for n, entry in pipeline.index.items() if is_part(entry) and n == "processor"]
    if silent:
        return {part: TextProcessor(Silent()) for part in parts}
    return {part: TextProcessor(tokenizer(pipeline, part)) for part in parts}


def tokenizer(pipeline: Pipeline, part: str) -> Any:
    """The tokenizer in a part's folder.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(str(pipeline.root / part), local_files_only=True)
    except Exception as error:  # whatever a directory can make of a library
        raise ValueError(f"{pipeline} cannot be loaded: {first_sentence(error)}") from error
