"""OCR: how much of the text that a prompt asks for can be read off the image."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.rewards.base import Metadata
from tiltflow.rewards.packages import require_packages

CLOSED_BY = {'"': '"', "“": "”", "„": "“”", "«": "»"}
"""The opening quotation marks, each with those that close it. Single ones are apostrophes too
often."""

_MARKS = re.compile('"+|[“”„«»]')  # doubled straight marks, as in CSV files, are one


class OCR:
    """1 − min(d, n)/n in [0, 1], with d the edit distance from the text read off the image to the
    quoted text of the prompt and n the length of the latter; 1 where the one contains the other.

    Spaces and case do not count. This is Flow-GRPO's `ocr.py` (yifan123/flow_grpo), with the
    PyPI package `rapidocr` in place of PaddleOCR. A prompt with several quotations asks for all
    of them, in order; the published score looks at the first. How Unicode spells a letter does not
    count either, which it does there. Not differentiable; runs on the CPU.

    Raises:
        ValueError: if `rapidocr` is not installed, or a prompt quotes no text.
    """

    name = "ocr"
    differentiable = False
    domain = "images"
    at_once = None  # read one by one

    def __init__(self, device: str | torch.device = "cpu") -> None:
        require_packages("ocr")
        from rapidocr import RapidOCR

        settings = {
            "Global.log_level": "error",
            # As PaddleOCR 2 in Flow-GRPO: no look at which way up text is, images as they are up
            # to 960 pixels. (rapidocr's own default enlarges the shorter side to 736.)
            "Global.use_cls": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": 960,
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        self.engine: Any = RapidOCR(params=settings)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        targets = [quoted_text(prompt) for prompt in prompts]
        pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        scores = [
            text_score(self.read(array), target)
            for array, target in zip(arrays, targets, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)

    def read(self, image: NDArray[np.uint8]) -> str:
        """All text found in an image (H, W, 3) of RGB, from top to bottom."""
        found = self.engine(np.ascontiguousarray(image[..., ::-1]))  # it expects BGR
        return " ".join(found.txts or ())


def quoted_text(prompt: str) -> str:
    """What the prompt quotes, in order, joined by spaces.

    A straight mark after a digit, outside a quotation, is an inch mark: `a 15" screen`. One after
    a digit inside a quotation ends it.

    Raises:
        ValueError: if it quotes nothing that has a letter, digit or sign in it, or a mark has no
            partner, so that nobody can tell what is quoted.
    """
    text = " ".join(filter(None, (part.strip() for part in _quotations(prompt))))
    if not text:
        raise ValueError(f'the prompt {prompt!r} has no "quoted text" to look for')
    return text


def _quotations(prompt: str) -> list[str]:
    found: list[str] = []
    inside: str | None = None  # the mark that opened a quotation, and where its text begins
    begin = 0
    for match in _MARKS.finditer(prompt):
        mark, at = match[0][0], match.start()
        if inside is not None:
            if mark in CLOSED_BY[inside]:
                found.append(prompt[begin:at])
                inside = None
        elif mark in '"”' and prompt[:at][-1:].isdigit():
            continue  # inches
        elif mark in CLOSED_BY:
            inside, begin = mark, match.end()
        else:
            raise _unpaired(prompt, mark)
    if inside is not None:
        raise _unpaired(prompt, inside)
    return found


def _unpaired(prompt: str, mark: str) -> ValueError:
    return ValueError(
        f"the prompt {prompt!r} has a quotation mark {mark} without a partner, so it cannot be "
        "told what it quotes (inches may be written 15-inch or 15″)"
    )


def text_score(read: str, target: str) -> float:
    """1 − min(edit distance, length)/length of the target, without spaces and case."""
    got, want = _normalised(read), _normalised(target)
    if want in got:
        return 1.0
    return 1 - min(edit_distance(got, want), len(want)) / len(want)


def _normalised(text: str) -> str:
    """Without spaces and case, and with one spelling of a letter, composed or not, wide or not."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(unicodedata.normalize("NFKC", folded).split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
