"""What benchmarks/videos.py shows: its table, and clips side by side that move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from support import moving_shapes as world
from support.tables import markdown
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.statistics import mean_ci, paired_comparison, score_ci
from tiltflow.models.medium import VIDEOS
from tiltflow.tasks.request import prepare

Scores = Mapping[str, Sequence[float]]
HELD_OUT = "direction_right, held out"
"""The same of the captions that no training had."""
SHOWN = ("colour_right", "direction_right", HELD_OUT, "poster", "steered", "travel")
TITLES = {"teacher": "teacher", "teacher_4_step": "teacher, 4 steps", "ac_dmd": "stage 1"}
ENLARGED, GAP, LEFT, TOP = 2, 4, 92, 26
"""Of the picture: a pixel's side, the space between clips, and room for words."""


def of_arm(cells: Mapping[str, Any], arm: str, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Every measure of every prompt, its mean over the runs."""
    runs = [cells[f"{arm}, seed {seed}"][0] for seed in seeds if f"{arm}, seed {seed}" in cells]
    return {
        name: [sum(each) / len(each) for each in zip(*(run[name] for run in runs), strict=True)]
        for name in runs[0]
    }


def column(scores: Scores, name: str, texts: Sequence[str]) -> tuple[list[float], list[str]]:
    """A measure of every video, and the captions."""
    values = scores["direction_right" if name == HELD_OUT else name]
    asked = {each.text for each in world.scenes(True)} if name == HELD_OUT else set(texts)
    kept = [(v, text) for v, text in zip(values, texts, strict=True) if text in asked]
    return [v for v, _ in kept], [text for _, text in kept]


def table(
    cells: Mapping[str, Any], texts: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> str:
    """The measures of each system, then of each tilted one less stage 1, each with its interval
    over captions; then of every run alone."""
    start: dict[str, Scores] = cells["start"]
    systems = {"drawn, through the autoencoder": cells["copies"]}
    systems |= {TITLES[name]: scores for name, scores in start.items()}
    tilted = {f"tilted: {arm}": of_arm(cells, arm, seeds) for arm in arms}
    teacher, below = start["teacher"]["motion"], start["ac_dmd"]
    rows = [
        [name, *(alone(each, m, texts) for m in SHOWN),
         factor(each["motion"], teacher, texts)]
        for name, each in (systems | tilted).items()
    ]  # fmt: skip
    less = [
        [name, *(difference(each, below, m, texts) for m in SHOWN),
         factor(each["motion"], below["motion"], texts)]
        for name, each in tilted.items()
    ]  # fmt: skip
    single = [
        [f"{arm}, seed {seed}", *(f"{np.mean(column(run, m, texts)[0]):.3f}" for m in SHOWN),
         f"{np.exp(np.mean(run['motion']) - np.mean(teacher)):.2f}"]
        for arm in arms for seed in seeds for run in cells.get(f"{arm}, seed {seed}", [])
    ]  # fmt: skip
    return "\n\n".join(
        [
            markdown(["system", *SHOWN, "motion ÷ teacher's"], rows),
            markdown(["less stage 1", *SHOWN, "motion ÷ stage 1's"], less),
            markdown(["run", *SHOWN, "motion ÷ teacher's"], single),
        ]
    )


def spoken(found: Sequence[float], sign: str = "") -> str:
    return "{0:{s}.3f} [{1:{s}.3f}, {2:{s}.3f}]".format(*found, s=sign)


def alone(scores: Scores, name: str, texts: Sequence[str]) -> str:
    values, asked = column(scores, name, texts)
    return spoken(score_ci(values, clusters=asked))


def difference(a: Scores, b: Scores, name: str, texts: Sequence[str]) -> str:
    (first, asked), (second, _) = column(a, name, texts), column(b, name, texts)
    found = paired_comparison(first, second, asked)
    return spoken((found.difference, *found.ci95), "+")


def factor(a: Sequence[float], b: Sequence[float], texts: Sequence[str]) -> str:
    """Of two columns of logarithms the ratio of their geometric means."""
    found = np.exp(mean_ci(np.subtract(a, b), clusters=texts))
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def chosen() -> list[Prompt]:
    """The first held-out caption of each direction, so that nobody chose them."""
    first: dict[str, str] = {}
    for scene in world.scenes(True):
        first.setdefault(scene.direction, scene.text)
    return [Prompt(text) for text in first.values()]


def columns(bench: Any, arms: Sequence[str]) -> dict[str, Tensor]:
    """Videos (N, F, 3, H, W) by the title of their column, a row of each from one noise."""
    made: dict[str, Tensor] = {}
    prompts = chosen()
    for arm in arms:
        loaded, sampler = prepare(bench.request(arm, prompts=prompts))
        for system in sampler.systems(loaded, teacher=not made):
            title = TITLES.get(system.name, f"tilted: {arm}")
            if title not in made:
                made[title] = system.sample(range(len(prompts)))
    return made


def picture(bench: Any, arms: Sequence[str], file: Path) -> None:
    """A column of clips a system and a row a prompt, as an animation."""
    made = {title: VIDEOS.encode(VIDEOS.rounded(v)) for title, v in columns(bench, arms).items()}
    step = world.SIDE * ENLARGED + GAP
    size = (LEFT + step * len(made), TOP + step * len(chosen()))
    frames = []
    for at in range(world.FRAMES):
        page = Image.new("RGB", size, "white")
        words = ImageDraw.Draw(page)
        for row, prompt in enumerate(chosen()):
            lines = prompt.text.replace(" moves", "\nmoves")
            words.text((2, TOP + row * step + 10), lines, "black", ImageFont.load_default(10))
        for column, (title, videos) in enumerate(made.items()):
            left = LEFT + column * step
            heading = title.replace("tilted: ", "").replace(" and", "\nand").replace(", ", "\n")
            words.text((left, 2), heading, "black", ImageFont.load_default(9))
            for row, video in enumerate(videos):
                clip = Image.fromarray(video[at]).resize([step - GAP] * 2, Image.Resampling.NEAREST)
                page.paste(clip, (left, TOP + row * step))
        frames.append(page)
    file.parent.mkdir(parents=True, exist_ok=True)
    # the last frame stays a while, so that one sees where a clip begins
    shown = [110] * (len(frames) - 1) + [700]
    frames[0].save(
        file, save_all=True, append_images=frames[1:], duration=shown, loop=0, quality=55, method=6
    )
