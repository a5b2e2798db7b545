"""What prompts need: packages that they go through, and of a processor, which is for pictures too,
its tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tiltflow.core.sentences import first_sentence
from tiltflow.models.family import Family
from tiltflow.models.pipelines.directory import Pipeline, is_part

if TYPE_CHECKING:
    from tiltflow.models.pipelines.processor import TextProcessor


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


def processors_of(pipeline: Pipeline, silent: bool) -> dict[str, TextProcessor]:
    """The processors of a pipeline by the parts' names; `silent` reads no tokenizer.

    Raises:
        ValueError: if a tokenizer cannot be loaded.
    """
    from tiltflow.models.pipelines.processor import Silent, TextProcessor

    parts = [n for n, entry in pipeline.index.items() if is_part(entry) and n == "processor"]
    if silent:
        return {part: TextProcessor(Silent()) for part in parts}
    return {part: TextProcessor(tokenizer(pipeline, part)) for part in parts}


def tokenizer(pipeline: Pipeline, part: str) -> Any:
    """The tokenizer in a part's folder.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(pipeline.root / part), local_files_only=True)
    except Exception as error:  # whatever a directory can make of a library
        raise ValueError(f"{pipeline} cannot be loaded: {first_sentence(error)}") from error
