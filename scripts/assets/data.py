"""Training data of the assets: rendered scenes, their captions, and near-miss captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tiltflow.rewards.worlds import shapes

POOLS = {"pool": (40_000, 1), "more": (60_000, 3)}  # training renders: how many, seed
VALID = (1_000, 2)


def sample_captions(n: int, seed: int) -> list[shapes.Caption]:
    """`n` captions of the train split, the six categories with equal probability."""
    rng = np.random.default_rng([seed, 1])
    table = shapes.split(held_out=False)
    chosen = []
    for _ in range(n):
        options = table[str(rng.choice(shapes.CATEGORIES))]
        chosen.append(options[rng.integers(len(options))])
    return chosen


def render_pool(directory: Path, name: str) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 renders and their captions, made once and memory-mapped after."""
    images, texts = directory / f"{name}.npy", directory / f"{name}.txt"
    if not texts.exists():
        directory.mkdir(parents=True, exist_ok=True)
        n, seed = POOLS.get(name, VALID)
        captions = sample_captions(n, seed)
        out = np.lib.format.open_memmap(
            images, mode="w+", dtype=np.uint8, shape=(n, shapes.SIZE, shapes.SIZE, 3)
        )
        for i, scene in enumerate(_scenes(captions, seed)):
            out[i] = shapes.render(scene)
        out.flush()
        texts.write_text("\n".join(c.text for c in captions))
    return np.load(images, mmap_mode="r"), texts.read_text().split("\n")


def _scenes(captions: list[shapes.Caption], seed: int) -> Iterator[shapes.Scene]:
    rng = np.random.default_rng([seed, 2])
    for caption in captions:
        yield shapes.sample_scene(caption, rng)


def place_labels(directory: Path, name: str, side: int) -> np.ndarray:
    """(n, side², 2) uint8: shape and colour (1-based; 0 is background) at places of a pool."""
    path = directory / f"{name}_places_{side}.npy"
    if not path.exists():
        centres = (np.arange(side) + 0.5) / side
        x, y = np.meshgrid(centres, centres)
        names, tints = list(shapes.SHAPES), list(shapes.COLOURS)
        n, seed = POOLS[name]
        labels = np.zeros((n, side * side, 2), dtype=np.uint8)
        for i, scene in enumerate(_scenes(sample_captions(n, seed), seed)):
            for o in scene.objects:
                inside = (np.hypot(x - o.x, y - o.y) < 1.2 * o.radius).ravel()
                labels[i, inside] = (names.index(o.shape) + 1, tints.index(o.colour) + 1)
        np.save(path, labels)
    return np.load(path)


def _other(options: list, current: object, rng: np.random.Generator) -> object:
    rest = [o for o in options if o != current]
    return rest[rng.integers(len(rest))]


def near_miss(caption: shapes.Caption, rng: np.random.Generator) -> str:
    """A caption that differs in one respect, and that an image of the first contradicts."""
    items, changes = list(caption.items), ["shape", "colour"]
    changes += ["relation"] * (4 * bool(caption.relation))
    changes += ["count", "count"] * (len(items) == 1)
    changes += ["swap"] * (len({i.colour for i in items}) * len({i.shape for i in items}) == 4)
    changes += ["background"] * bool(caption.background) + ["extra"]
    change = changes[rng.integers(len(changes))]
    at = int(rng.integers(len(items)))
    if change == "shape":
        items[at] = replace(items[at], shape=_other(list(shapes.SHAPES), items[at].shape, rng))
    elif change == "colour":
        shown = items[at].colour or shapes.DEFAULT_COLOUR
        items[at] = replace(items[at], colour=_other(list(shapes.COLOURS), shown, rng))
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


def false_captions(texts: Sequence[str], each: int, seed: int) -> np.ndarray:
    """(N, `each`) rows of `texts` that are near misses of text n, itself where it has none there.

    `texts` are captions of the train split (others are a KeyError), and so are the false ones.
    """
    rng, row = np.random.default_rng([seed, 3]), {text: i for i, text in enumerate(texts)}
    table = {c.text: c for options in shapes.split(held_out=False).values() for c in options}
    out = np.empty((len(texts), each), dtype=np.int64)
    for i, text in enumerate(texts):
        tries = (row.get(near_miss(table[text], rng)) for _ in range(8 * each))
        found = [t for t in tries if t is not None][:each] or [i]
        out[i] = [found[k % len(found)] for k in range(each)]
    return out
