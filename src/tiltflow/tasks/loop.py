"""`tiltflow demo --loop`: from choices to a tilt, with a simulated person who chooses.

Two rounds. She votes between pairs of the cold start's images, with noise; `fit-reward` makes a
reward of the votes, and stage 2 tilts to it for a while. Then she votes between that student and
the cold start, from the same noise: where the first reward went wrong, these votes say so. Stage 2
tilts the cold start to the reward of all votes. At last she chooses, without noise, between the
tilted student and the cold start on held-out prompts, each pair from the same noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.text import Text

from tiltflow.core.disk import write_whole, writing
from tiltflow.data.preferences import append_vote
from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.evaluation.statistics import mean_ci, paired_comparison
from tiltflow.evaluation.watch.history import FILE, read_history
from tiltflow.models.roles import Role
from tiltflow.rewards.packaged import CLIP, CLIP_HELDOUT
from tiltflow.rewards.worlds.shapes_checker import caption_from_text, read_scene, score
from tiltflow.rewards.worlds.shapes_taste import liking, votes
from tiltflow.tasks.demo import MODEL, train_stage
from tiltflow.tasks.evaluate import save_samples
from tiltflow.tasks.fit_reward import fit_reward
from tiltflow.tasks.request import Request, prepare
from tiltflow.tasks.systems import Sampler

Images = NDArray[np.uint8]
Array = NDArray[np.float64]

NOISE = 0.15
"""The share of her votes that are the other way round."""
VOTES = "preferences.jsonl"
SHOWN = 12
"""Pairs in the picture."""
CLIPS = {"taste": CLIP, "taste_heldout": CLIP_HELDOUT}
"""The fitted rewards: one is trained on; the other, on other features, is only watched."""


@dataclass(frozen=True)
class Size:
    """By round, votes, the fitted reward's weight beside CLIPScore's 1, and iterations of stage 2,
    of `batch` images each; held-out pairs. The first round goes further than one would keep, so
    that its votes teach something."""

    votes: tuple[int, int] = (100, 100)
    weights: tuple[float, float] = (0.6, 0.15)
    steps: tuple[int, int] = (60, 120)
    batch: int = 32
    held_out: int = 300


def run_loop(out: Path, console: Console, size: Size | None = None) -> dict[str, Any]:
    """Votes, fits and tilts twice and compares in `out`/loop, the first round in `out`/loop/first;
    `out`/cold_start is trained if it is missing.

    Returns what `out`/loop/loop.json holds. A part that is there already is not made again.

    Raises:
        ValueError: if the votes cannot be fitted (as `fit_reward`).
    """
    size, began, place = size or Size(), time.time(), out / "loop"
    console.rule(Text("cold_start", "bold"))
    train_stage("cold_start", out, (), console)
    files = [place / "first" / VOTES, place / VOTES]
    for number, file in enumerate(files):
        console.rule(Text(f"votes, round {number + 1}", "bold"))
        if not file.exists():
            vote(out, file, number, size.votes, console)
        about = {}
        for name, clip in CLIPS.items():
            console.print(f"{name}, on {clip}:")
            fitted = file.parent / name
            about[name] = fit_reward(files[: number + 1], fitted, clip, "cpu", console.print)
        console.rule(Text(f"tilt, round {number + 1}", "bold"))
        changed = changes(file.parent, size, number)
        train_stage("tilt", out, changed, console, str(file.parent.relative_to(out) / "tilt"))
    console.rule(Text("held-out pairs", "bold"))
    found = compared(out, size.held_out)
    found["accuracy"] = {name: one["accuracy"] for name, one in about.items()}
    found["votes"], found["minutes"] = sum(size.votes), round((time.time() - began) / 60, 1)
    write_whole(place / "loop.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    for line in said(found):
        console.print(line, highlight=False)
    console.print(f"the pairs: {place / 'pairs.png'}")
    return found


def changes(place: Path, size: Size, number: int) -> list[str]:
    """What differs from the recipe `demo_tilt` in a round, whose rewards were fitted in `place`.
    Only the last round is watched: of the first nothing but images is used."""
    steps = size.steps[number]
    rewards = {"clipscore": 1.0, str(place / "taste"): size.weights[number]}
    held_out = dict.fromkeys((str(place / "taste_heldout"), "shapes", "clipscore_heldout"), 1.0)
    return [
        f"rewards={json.dumps(rewards)}",
        f"watch.rewards={json.dumps(held_out) if number else '{}'}",
        f"train.steps={steps}",
        f"train.batch_size={size.batch}",
        "train.generator_lr=6.0e-4",  # this and the next as its rounds were tried (docs/desk.md)
        "tilt.reward_steps=3",
        f"watch.every={max(1, steps // 2)}",
        f"log.samples_every={steps}",
        f"checkpoint.every={max(1, steps // 2)}",
    ]


def vote(out: Path, file: Path, number: int, counts: Sequence[int], console: Console) -> None:
    """Shows her the pairs of round `number`, each of one training prompt, and appends her votes to
    `file` once all are there; the images are beside it. In round 0 the cold start has made both
    from two noises, then it and round 0's student from one."""
    count = counts[number]
    prompts = load_prompts("shapes-train")[sum(counts[:number]) :][:count]
    first = file.parent / "first" / "tilt" / "export" / "tilt" if number else None
    # Noise of its own: the evaluation's seed is 0.
    request = Request(
        model=MODEL,
        prompts=prompts,
        few_step=out / "cold_start" / "export" / "few_step",
        tilt_lora=first,
        autocast="auto",
        seed=1 + number,
    )
    loaded, sampler = prepare(request)
    sides = (("rtdmd", 0), ("ac_dmd", 0)) if number else (("ac_dmd", 0), ("ac_dmd", 1))
    pair = [_images(sampler, loaded.students[name], count, draw) for name, draw in sides]
    liked = [likings(images, prompts) for images in pair]
    chosen = votes(liked[0], liked[1], NOISE, np.random.default_rng(number))
    for side, images in zip("ab", pair, strict=True):
        save_samples(loaded.backbone.medium, file.parent / "votes" / side, range(count), images)
    part = file.with_suffix(".part")
    part.unlink(missing_ok=True)
    for row, (prompt, a) in enumerate(zip(prompts, chosen, strict=True)):
        images_of = {f"image_{side}": f"votes/{side}/{row:05d}.png" for side in "ab"}
        append_vote(part, {"prompt": prompt.text, **images_of, "choice": "a" if a else "b"})
    part.replace(file)
    console.print(f"{count} votes, {NOISE:.0%} of them by chance the other way: {file}")


def likings(images: Images, prompts: Sequence[Prompt]) -> Array:
    """How much she likes each of (n, H, W, 3) images of their prompts."""
    pairs = zip(images, prompts, strict=True)
    return np.array([liking(image, caption_from_text(prompt.text)) for image, prompt in pairs])


def compared(out: Path, count: int) -> dict[str, Any]:
    """The tilted student and the cold start on `count` held-out prompts, paired."""
    prompts = load_prompts("shapes-heldout")[:count]
    export = out / "loop" / "tilt" / "export"
    request = Request(
        model=MODEL,
        prompts=prompts,
        few_step=export / "few_step",
        tilt_lora=export / "tilt",
        autocast="auto",
    )
    loaded, sampler = prepare(request)
    cold, tilted = (
        _images(sampler, loaded.students[name], count, 0) for name in ("ac_dmd", "rtdmd")
    )
    texts = [prompt.text for prompt in prompts]
    after, before = likings(tilted, prompts), likings(cold, prompts)
    liked = after - before
    chosen = paired_comparison(after, before, texts)
    rate = mean_ci((liked > 0) + 0.5 * (liked == 0), clusters=texts)
    right = _shapes(tilted, prompts), _shapes(cold, prompts)
    shapes = paired_comparison(*right, texts)
    picture(out / "loop" / "pairs.png", cold, tilted)
    alarms = [
        text for one in read_history(out / "loop" / "tilt" / FILE) for text in one.alarms.values()
    ]
    return {
        "pairs": count,
        "win_rate": chosen.win_rate,
        "win_rate_ci95": list(rate[1:]),
        "shapes": {"tilted": float(np.mean(right[0])), "cold_start": float(np.mean(right[1]))},
        "shapes_difference": shapes.difference,
        "shapes_ci95": list(shapes.ci95),
        "alarms": alarms,
    }


def _shapes(images: Images, prompts: Sequence[Prompt]) -> Array:
    pairs = zip(images, prompts, strict=True)
    return np.array([score(read_scene(i), caption_from_text(p.text))[0] for i, p in pairs])


@torch.no_grad()
def _images(sampler: Sampler, role: Role, count: int, draw: int) -> Images:
    medium = role.backbone.medium
    parts = []
    for start in range(0, count, 64):
        rows = range(start, min(start + 64, count))
        parts.append(medium.encode(medium.rounded(sampler.few_step(role, rows, draw))))
    return np.concatenate(parts)


def picture(file: Path, cold: Images, tilted: Images) -> None:
    """The first pairs: the cold start's images above, the tilted student's below."""
    rows = [np.concatenate(list(images[:SHOWN]), axis=1) for images in (cold, tilted)]
    with writing(file):
        Image.fromarray(np.concatenate(rows)).save(file)


def said(found: dict[str, Any]) -> list[str]:
    """The figures in sentences."""
    low, high = found["win_rate_ci95"]
    fall, rise = found["shapes_ci95"]
    shapes, alarms = found["shapes"], found["alarms"]
    return [
        f"the tilted student is chosen in {found['win_rate']:.3f} [{low:.3f}, {high:.3f}] of "
        f"{found['pairs']} held-out pairs",
        f"shapes: {shapes['tilted']:.3f}, cold start {shapes['cold_start']:.3f}; difference "
        f"{found['shapes_difference']:+.3f} [{fall:+.3f}, {rise:+.3f}]",
        f"the watch: {'; '.join(alarms) if alarms else 'no alarm'}",
    ]
