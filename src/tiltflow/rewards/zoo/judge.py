"""A vision-language model that is asked how good images are: `judge:MODEL`.

It is behind an endpoint that speaks OpenAI's chat completions, as vLLM, SGLang and llama.cpp's
server do (`remote/endpoint.py`), or runs here (`judge_local.py`). `Judge` shows it one image at a
time, so that a score is of its image and prompt alone.
`GroupJudge` shows it the images of a group together, and is no reward but a ranker.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tiltflow.rewards.base import Metadata
from tiltflow.rewards.questions import Form, Model, Pixels, Question, seen
from tiltflow.rewards.ranking import Groups
from tiltflow.rewards.remote.asking import JudgeSettings
from tiltflow.rewards.remote.wire import eight_bits

FORMAT = "tiltflow-judge-1"


class Judge:
    """What the model says of each image, from `low` to `high`; not differentiable.

    Images are rounded to eight bits. An answer is kept by the image, the prompt, the rubric and the
    model, so the same is never asked twice.

    Raises:
        ValueError: by a call, as the model's `answers`.
        Stopped: by a call, if the run is asked to stop while it waits.
    """

    differentiable = False
    domain = "images"

    def __init__(self, name: str, settings: JudgeSettings, model: Model) -> None:
        self.name, self.settings, self._model = name, settings, model
        self.elsewhere = model.elsewhere
        low, high = settings.low, settings.high
        self._form = Form(
            key="score",
            example='{"score": N}',
            noun="score",
            said=f'Answer with JSON alone: {{"score": N}}, N a number from {low:g} to {high:g}.',
            schema={"type": "number", "minimum": low, "maximum": high},
            read=self._score,
        )

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        pairs = zip(eight_bits(images), prompts, strict=True)
        scores = self._model.answers([self._question(*pair) for pair in pairs])
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _question(self, pixels: Pixels, prompt: str) -> Question[float]:
        on, limits = self._model, [self.settings.low, self.settings.high]
        facts = [FORMAT, on.identity, on.rubric, limits, prompt, list(pixels.shape), seen(pixels)]
        return Question(prompt, [pixels], self._form, facts)

    def _score(self, score: object) -> float:
        low, high = self.settings.low, self.settings.high
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ValueError("the score is no number")
        if not low <= score <= high or not math.isfinite(score):
            raise ValueError(f"the score is not from {low:g} to {high:g}")
        return float(score)


class GroupJudge:
    """How the model ranks the images of a prompt: all of a group at once, or by pairs.

    Of n images ranked at once, the k-th of them (from 0) stands at (n − 1 − k) / (n − 1). By pairs
    every image meets every other, and stands at the share of the meetings that it won, a tie half.
    The images are shown in the group's counted order, as a model may favour a place. Answers are
    kept by the images in that order, the prompt, the rubric and the model.

    Raises:
        ValueError: by a call, as the model's `answers`.
        Stopped: by a call, if the run is asked to stop while it waits.
    """

    def __init__(self, name: str, settings: JudgeSettings, model: Model) -> None:
        self.name, self.elsewhere = name, model.elsewhere
        self._model, self._pairs = model, settings.form == "pairs"

    def __call__(self, images: Tensor, prompts: Sequence[str], groups: Groups) -> Tensor:
        pixels, size = list(eight_bits(images)), groups.size
        firsts = range(0, len(pixels), size)
        shown = [
            [first + place for place in groups.order(number, size)]
            for number, first in enumerate(firsts)
        ]
        stand = self._by_pairs if self._pairs else self._at_once
        found = torch.zeros(len(pixels))
        for rows, standings in zip(shown, stand(pixels, prompts, shown), strict=True):
            found[rows] = torch.tensor(standings)
        return found.to(images.device)

    def _at_once(
        self, pixels: Sequence[Pixels], prompts: Sequence[str], shown: Sequence[list[int]]
    ) -> list[list[float]]:
        """The standings of each group's images in the order in which they were shown."""
        asked = [self._question(pixels, prompts, rows, ranking_form(len(rows))) for rows in shown]
        found = []
        for ranking in self._model.answers(asked):
            last = len(ranking) - 1
            standings = [0.0] * len(ranking)
            for place, number in enumerate(ranking):
                standings[number - 1] = (last - place) / last
            found.append(standings)
        return found

    def _by_pairs(
        self, pixels: Sequence[Pixels], prompts: Sequence[str], shown: Sequence[list[int]]
    ) -> list[list[float]]:
        meetings = [
            (group, pair)
            for group, rows in enumerate(shown)
            for pair in itertools.combinations(range(len(rows)), 2)
        ]
        asked = [
            self._question(pixels, prompts, [shown[group][place] for place in pair], CHOICE)
            for group, pair in meetings
        ]
        found = [[0.0] * len(rows) for rows in shown]
        answers = self._model.answers(asked)
        for (group, (one, other)), better in zip(meetings, answers, strict=True):
            won = {1: 1.0, 2: 0.0, 0: 0.5}[better]
            share = 1 / (len(shown[group]) - 1)
            found[group][one] += won * share
            found[group][other] += (1 - won) * share
        return found

    def _question(
        self, pixels: Sequence[Pixels], prompts: Sequence[str], rows: Sequence[int], form: Form
    ) -> Question:
        on, prompt, pictures = self._model, prompts[rows[0]], [pixels[row] for row in rows]
        images = [[*picture.shape, seen(picture)] for picture in pictures]
        facts = [FORMAT, form.key, on.identity, on.rubric, prompt, images]
        return Question(prompt, pictures, form, facts)


def _better(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number not in (0, 1, 2):
        raise ValueError("the better one is not 1, 2 or 0")
    return number


CHOICE = Form(
    key="better",
    example='{"better": N}',
    noun="choice",
    said='There are two images. Answer with JSON alone: {"better": N}, N the number of the better '
    "image, 1 or 2, or 0 if neither is better.",
    schema={"type": "integer", "enum": [0, 1, 2]},
    read=_better,
)


def ranking_form(n: int) -> Form[list[int]]:
    """The form of a ranking of n images."""

    def read(ranking: object) -> list[int]:
        whole = isinstance(ranking, list) and all(type(number) is int for number in ranking)
        if not whole or sorted(ranking) != list(range(1, n + 1)):  # type: ignore[call-overload]
            raise ValueError(f"the ranking is not each of 1 to {n} once")
        return list(ranking)  # type: ignore[call-overload]

    return Form(
        key="ranking",
        example='{"ranking": [N, ...]}',
        noun="ranking",
        said=f"There are {n} images, numbered from 1 in the order in which they are shown. Answer "
        'with JSON alone: {"ranking": [N, ...]}, their numbers from the best image to the worst, '
        "each once.",
        schema={
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": n},
            "minItems": n,
            "maxItems": n,
        },
        read=read,
    )
