"""Training data of the assets: rendered scenes, their captions, and near-miss captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tiltflow.worlds import shapes

_FLIP = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def sample_captions(n: int, seed: int) -> list[shapes.Caption]:
    """`n` captions of the train split, the six categories with equal probability."""
    rng = np.random.default_rng([seed, 1])
    table = shapes.split(held_out=False)
    chosen = []
    for _ in range(n):
        options = table[str(rng.choice(shapes.CATEGORIES))]
        chosen.append(options[rng.integers(len(options))])
    return chosen


def render_pool(directory: Path, name: str, n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 renders and their captions, made once and memory-mapped after."""
    images, texts = directory / f"{name}.npy", directory / f"{name}.txt"
    if not texts.exists():
        directory.mkdir(parents=True, exist_ok=True)
        captions = sample_captions(n, seed)
        rng = np.random.default_rng([seed, 2])
        out = np.lib.format.open_memmap(
            images, mode="w+", dtype=np.uint8, shape=(n, shapes.SIZE, shapes.SIZE, 3)
        )
        for i, caption in enumerate(captions):
            out[i] = shapes.render(shapes.sample_scene(caption, rng))
        out.flush()
        texts.write_text("\n".join(c.text for c in captions))
    return np.load(images, mmap_mode="r"), texts.read_text().split("\n")


def _other(options: list, current: object, rng: np.random.Generator) -> object:
    rest = [o for o in options if o != current]
    return rest[rng.integers(len(rest))]


def near_miss(caption: shapes.Caption, rng: np.random.Generator) -> str:
    """A caption that differs in one respect, and that an image of the first contradicts."""
    items, changes = list(caption.items), ["shape"]
    coloured = [i for i, item in enumerate(items) if item.colour]
    changes += ["colour"] * bool(coloured) + ["relation", "relation"] * bool(caption.relation)
    changes += ["count", "count"] * (len(items) == 1)
    changes += ["swap"] * (len({i.colour for i in items}) * len({i.shape for i in items}) == 4)
    changes += ["background"] * bool(caption.background) + ["extra"]
    change = changes[rng.integers(len(changes))]
    at = int(rng.integers(len(items)))
    if change == "shape":
        items[at] = replace(items[at], shape=_other(list(shapes.SHAPES), items[at].shape, rng))
    elif change == "colour":
        at = coloured[rng.integers(len(coloured))]
        items[at] = replace(items[at], colour=_other(list(shapes.COLOURS), items[at].colour, rng))
    elif change == "count":
        items[0] = replace(items[0], count=_other([1, *shapes.COUNTS], items[0].count, rng))
    elif change == "swap":
        a, b = items
        items = [replace(a, colour=b.colour), replace(b, colour=a.colour)]
    elif change == "relation":
        options = [r for r in shapes.RELATIONS if r != caption.relation]
        relation = options[rng.integers(len(options))]
        return replace(caption, relation=relation).text
    elif change == "background":
        ground = _other(list(shapes.BACKGROUNDS), caption.background, rng)
        return replace(caption, background=ground).text
    elif len(items) == 2:
        return replace(caption, items=(items[at],), relation=None).text
    else:
        more = shapes.Item(str(rng.choice(shapes.SHAPES)), str(rng.choice(list(shapes.COLOURS))))
        return replace(caption, items=(items[0], more)).text
    return replace(caption, items=tuple(items)).text
