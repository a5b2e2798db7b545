"""GenEval 2: a vision-language model is asked about every part of a prompt (arXiv 2512.16853)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from tiltflow.rewards.base import Metadata
from tiltflow.rewards.weights import dtype_of, frozen, load_pretrained
from tiltflow.rewards.zoo.qwen import QwenPreprocessing, QwenText

QWEN3_VL = "Qwen/Qwen3-VL-8B-Instruct"

# `evaluation.py` of facebookresearch/GenEval2: how a question is put, and what counts as right.
ASKED = "{} Answer in one word."
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MEANS = ("geometric", "arithmetic")


@dataclass(frozen=True)
class Question:
    """A question about an image and the spellings of its right answer."""

    text: str
    answers: tuple[str, ...]


def questions_of(metadata: Metadata, prompt: str) -> list[Question]:
    """The questions in `vqa_list`, GenEval 2's list of [question, answer].

    Raises:
        ValueError: naming the prompt, if there are none, or an answer is neither Yes nor, to a
            question of how many, a number from one to ten in words.
    """
    pairs = metadata.get("vqa_list")
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise ValueError(f"{prompt!r} has no GenEval 2 metadata (a `vqa_list`)")
    return [_question(pair, prompt) for pair in pairs]


def _question(pair: object, prompt: str) -> Question:
    parts = pair if isinstance(pair, list | tuple) else ()
    texts = [part for part in parts if isinstance(part, str)]
    if not len(parts) == len(texts) == 2:
        raise ValueError(f"{prompt!r}: {pair!r} is not a question and its answer")
    question, answer = texts
    if question.startswith("How many"):
        if answer not in NUMBERS:
            raise ValueError(f"{prompt!r}: {answer!r} to {question!r} is no number in words")
        spellings = [answer, answer.capitalize(), str(NUMBERS.index(answer) + 1)]
    elif answer == "Yes":
        spellings = ["Yes", "yes"]
    else:
        raise ValueError(f"{prompt!r}: the answer to {question!r} is {answer!r}, not 'Yes'")
    both = (*spellings, *(f" {word}" for word in spellings))
    return Question(ASKED.format(question), both)


class GenEval2:
    """Soft-TIFA in [0, 1]: the mean over a prompt's questions of the chance of the right answer.

    The chance is that of the first token, summed over the spellings. The mean is geometric, which
    estimates whether all of the prompt is there (GenEval 2's figure by prompt), or arithmetic (by
    part of a prompt). Needs metadata with `vqa_list`. A prompt's questions are asked together, at
    most `batch` at once, and never with another prompt's: they are padded to the longest of them.
    Not differentiable.

    Raises:
        ValueError: if `path` is no Qwen3-VL, or a prompt has no such metadata.
    """

    name = "geneval2"
    differentiable = False
    domain = "images"
    at_once = 1

    def __init__(
        self,
        path: str = QWEN3_VL,
        device: str | torch.device = "cpu",
        *,
        mean: str = "geometric",
        dtype: str = "bf16",
        batch: int = 16,
    ) -> None:
        if mean not in MEANS:
            raise ValueError(f"the mean is {mean!r}; it is one of {', '.join(MEANS)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}; at least one question is asked at once")
        self.mean, self.batch = mean, batch
        precision = dtype_of(dtype)
        model = load_pretrained(Qwen3VLForConditionalGeneration, path, "Qwen3-VL", precision)
        self.model: Any = frozen(model, device, precision)
        self.device = torch.device(device)
        self.text = QwenText(path, device)
        self.preprocessing = QwenPreprocessing.from_pretrained(path)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        asked = [questions_of(about, text) for about, text in zip(metadata, prompts, strict=True)]
        chances = self.chances(images, asked)
        if self.mean == "arithmetic":
            return torch.stack([values.mean() for values in chances])
        return torch.stack([values.log().mean().exp() for values in chances])

    @torch.no_grad()
    def chances(self, images: Tensor, asked: Sequence[Sequence[Question]]) -> list[Tensor]:
        """Of each image's questions the chance of the right answer, fp32 on the CPU."""
        pixels = (images.clamp(0, 1) * 255).round() / 255  # the model sees images of eight bits
        count = self.preprocessing.tokens(*images.shape[-2:])
        found = []
        for image, questions in zip(pixels.to(self.device, torch.float32), asked, strict=True):
            seen = self._look(image[None].clone())
            parts = range(0, len(questions), self.batch)
            rows = [self._ask(questions[i : i + self.batch], seen, count) for i in parts]
            found.append(torch.cat(rows))
        return found

    def _look(self, image: Tensor) -> tuple[Any, Tensor]:
        """The features of one image (1, 3, H, W), computed once for all its questions."""
        patches, grid = self.preprocessing(image)
        with torch.autocast(self.device.type, enabled=False):
            return self.model.model.get_image_features(patches, grid, return_dict=True), grid

    def _ask(self, questions: Sequence[Question], seen: tuple[Any, Tensor], count: int) -> Tensor:
        """The chances (Q,) of the right answers to questions about one image."""
        features, grid = seen
        number = len(questions)
        tokens = self.text([question.text for question in questions], count)
        joined = type(features)(
            pooler_output=list(features.pooler_output) * number,
            deepstack_features=[list(layer) * number for layer in features.deepstack_features],
        )
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.model.model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                mm_token_type_ids=tokens.types,
                image_grid_thw=torch.cat([grid] * number),
                mm_encoder_outputs={"image": joined},
                use_cache=False,
            ).last_hidden_state
            at = hidden[torch.arange(number, device=self.device), tokens.last]
            chances = self.model.lm_head(at).float().softmax(-1).cpu()
        right = [sorted(self._first_tokens(question)) for question in questions]
        return torch.stack([row[ids].sum() for row, ids in zip(chances, right, strict=True)])

    def _first_tokens(self, question: Question) -> set[int]:
        encode = self.text.tokenizer.encode
        return {encode(word, add_special_tokens=False)[0] for word in question.answers}
