"""The exact checker of the world of shapes: read an image back, score it against a caption.

Reading: the border's median is the background, what differs from it falls into connected
parts (cut where two colours meet), and each part is matched with the renderer's own shapes
at the size and place that its moments give. Scoring: `strict` is 1 when the image shows what
the caption describes and nothing else; `soft` is the share of that description that holds,
and reaches 1 exactly when `strict` does.

Lengths in pixels below are for `SIZE` = 64 and grow with the image's side.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from tiltflow.rewards.worlds.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Caption,
    Item,
    captions,
    inside,
    relation_holds,
)

# Distances between colours are Euclidean in RGB, on the 0-255 scale.
MAX_BACKGROUND_DISTANCE = 60.0
MIN_CONTRAST = 50.0  # from the background; the faintest named pair, pink on white, has 121
MAX_COLOUR_DISTANCE = 50.0  # the nearest two named colours, orange and yellow, are 86 apart
MIN_COLOUR_GAP = 60.0  # between the medians of two colours, for a part to be cut in two
MIN_PART = 12 / SIZE**2  # as a share of the image: less is a speck, and ignored
MIN_SHAPE = 40 / SIZE**2  # less is an object without a shape; the renderer's least is 118 pixels
MIN_IOU = 0.8  # renders have 0.90 or more with their own shape, a shapeless blob 0.7 and less
SURE_IOU = 0.9  # from here on the fit by moments is not searched further
MAX_READ = 8  # only the largest parts are read; the rest are objects of no shape or colour

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_GROUND_NAMES = tuple(BACKGROUNDS)
_GROUNDS = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
_EIGHT = np.ones((3, 3), dtype=bool)
_CELLS, _EXTENT = 256, 1.5  # templates cover [-1.5, 1.5]² radii in 256² cells


@dataclass(frozen=True)
class Seen:
    """An object read from an image; centre and nominal radius as shares of the image's side.

    `shape` or `colour` is None where none of the world's fits; `radius` is then that of the
    best fit. `confidence` is the best intersection over union with a template, in [0, 1].
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What an image shows: its objects, largest first, and its background's name or None."""

    objects: tuple[Seen, ...]
    background: str | None


def read_scene(image: np.ndarray) -> Reading:
    """Read a (side, side, 3) uint8 image; ValueError on any other array or a side under 16."""
    side = len(image)
    if image.dtype != np.uint8 or image.shape != (side, side, 3) or side < 16:
        raise ValueError(
            "the image must be (side, side, 3) uint8 with a side of 16 or more; "
            f"got {image.shape} {image.dtype}"
        )
    pixels = image.astype(np.float32)
    w = max(1, side // 32)
    edges = (pixels[:w], pixels[-w:], pixels[:, :w], pixels[:, -w:])
    ground = _median(np.concatenate([e.reshape(-1, 3) for e in edges]))
    labels, areas = _parts(pixels, ground)
    order = 1 + np.argsort(-areas[1:], kind="stable")
    boxes = ndimage.find_objects(labels)
    objects = [
        _see(pixels, labels, int(k), boxes[k - 1], ground)
        if rank < MAX_READ
        else _pass_over(boxes[k - 1], float(areas[k]), side)
        for rank, k in enumerate(order)
        if areas[k] > 0
    ]
    return Reading(
        tuple(objects), _nearest(ground, _GROUNDS, _GROUND_NAMES, MAX_BACKGROUND_DISTANCE)
    )


def _median(colours: np.ndarray) -> np.ndarray:
    """The median of (n, 3) colours by channel, n >= 1 (the upper one where n is even)."""
    half = len(colours) // 2
    middle: np.ndarray = np.partition(colours, half, axis=0)[half]
    return middle


def _nearest(
    colour: np.ndarray, table: np.ndarray, names: Sequence[str], limit: float
) -> str | None:
    """The name of the (k, 3) table's colour nearest to a (3,) one, or None beyond the limit."""
    distances = np.sqrt(((table - colour) ** 2).sum(1))
    best = int(distances.argmin())
    return names[best] if distances[best] <= limit else None


def _erode(mask: np.ndarray) -> np.ndarray:
    """Where all of a pixel's 3 x 3 neighbours inside the frame are set; (h, w) bool."""
    padded = np.pad(mask, 1, constant_values=True)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    kept: np.ndarray = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return kept


def _parts(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parts that stand out from the background: (side, side) labels from 1, and areas.

    Two differently coloured objects that touch are two parts. The areas, in pixels, are by
    label; a speck's area is set to zero.
    """
    mask = ((pixels - ground) ** 2).sum(2) > MIN_CONTRAST**2
    labels, count = ndimage.label(mask)
    least = MIN_PART * mask.size
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    within = _erode(mask)
    colours = pixels[within]
    classes = (colours @ _PALETTE.T - (_PALETTE**2).sum(1) / 2).argmax(1)
    owners = labels[within]
    votes = np.bincount(
        owners * len(_NAMES) + classes, minlength=(count + 1) * len(_NAMES)
    ).reshape(count + 1, len(_NAMES))
    for k in np.flatnonzero((votes >= least).sum(1) >= 2):
        nearest = np.full(mask.shape, -1)
        nearest[within] = np.where(owners == k, classes, -1)
        _cut(labels, int(k), nearest, pixels)
    if labels.max() > count:
        areas = np.bincount(labels.ravel())
    return labels, np.where(areas >= least, areas, 0)


def _cut(labels: np.ndarray, k: int, classes: np.ndarray, pixels: np.ndarray) -> None:
    """Cut part `k` in place where its colours meet; the new parts get labels after the last.

    `classes` (side, side) is the nearest named colour in the part's interior, -1 elsewhere. A
    colour counts when some of its area survives erosion (a blend along a border does not) and
    its median is apart from those of the larger areas.
    """
    seeds = np.zeros(labels.shape, dtype=np.int64)
    medians: list[np.ndarray] = []
    cores = [_erode(classes == c) for c in range(len(_NAMES))]
    for core in sorted(cores, key=lambda core: -int(core.sum())):
        if core.sum() < MIN_PART * labels.size / 3:
            break
        median = _median(pixels[core])
        gaps = [float(np.linalg.norm(median - m)) for m in medians]
        if not gaps or min(gaps) > MIN_COLOUR_GAP:
            medians.append(median)
            seeds[core] = len(medians)
        else:
            seeds[core] = 1 + int(np.argmin(gaps))
    if len(medians) < 2:
        return
    rows, columns = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    areas = np.where(labels == k, seeds[rows, columns], 0)
    last = int(labels.max())
    for colour in range(1, len(medians) + 1):
        pieces, count = ndimage.label(areas == colour)
        labels[pieces > 0] = last + pieces[pieces > 0]
        last += count


def _pass_over(box: tuple[slice, slice], area: float, side: int) -> Seen:
    """A part that is not read: an object at its box's centre, of no shape or colour."""
    y, x = ((s.start + s.stop) / (2 * side) for s in box)
    return Seen(None, None, x, y, float(np.sqrt(area / np.pi)) / side, 0.0)


def _see(
    pixels: np.ndarray,
    labels: np.ndarray,
    k: int,
    box: tuple[slice, slice],
    ground: np.ndarray,
) -> Seen:
    """Read part `k`, which lies in `box`, as one object."""
    side = len(labels)
    y0, x0 = (max(s.start - 2, 0) for s in box)
    window = (slice(y0, box[0].stop + 2), slice(x0, box[1].stop + 2))
    own = labels[window] == k
    patch = pixels[window]
    core = _erode(own)
    colour = _median(patch[core if core.any() else own])
    # The cover: how far each pixel is on the way from the background to the colour, made
    # twice as steep about its middle, so that a soft edge costs little overlap.
    way = colour - ground
    share = (patch - ground) @ (way / max(float(way @ way), 1.0))
    near = ndimage.binary_dilation(own, _EIGHT) & (own | (labels[window] == 0))
    cover = np.clip(2 * share - 0.5, 0.0, 1.0) * near
    if cover.sum() < 1.0:  # colours so mixed that their median is the background's
        cover = own.astype(np.float32)
    area = float(cover.sum())
    y = float(cover.sum(1) @ np.arange(0.5, len(cover))) / area
    x = float(cover.sum(0) @ np.arange(0.5, cover.shape[1])) / area
    index, x, y, radius, iou = _fit(cover, x, y, area)
    known = iou >= MIN_IOU and own.sum() >= MIN_SHAPE * side**2
    return Seen(
        SHAPES[index] if known else None,
        _nearest(colour, _PALETTE, _NAMES, MAX_COLOUR_DISTANCE),
        (x0 + x) / side,
        (y0 + y) / side,
        radius / side,
        iou,
    )


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Integral images (shapes, _CELLS + 1, _CELLS + 1) in cells, areas (shapes,) in radii²."""
    cell = 2 * _EXTENT / _CELLS
    line = -_EXTENT + (np.arange(_CELLS) + 0.5) * cell
    v, u = np.meshgrid(line, line, indexing="ij")
    masks = np.stack([inside(shape, u, v) for shape in SHAPES])
    sums = np.zeros((len(SHAPES), _CELLS + 1, _CELLS + 1), dtype=np.float32)
    sums[:, 1:, 1:] = masks.cumsum(1).cumsum(2)  # whole numbers under 2^24: exact
    return sums, sums[:, -1, -1] * cell**2


def _overlaps(
    cover: np.ndarray, shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray
) -> np.ndarray:
    """Intersection over union (k,) of a soft cover (h, w) with k anti-aliased templates.

    `shape` (k,) indexes SHAPES; centres and radii (k,) are in pixels of the cover's window.
    A template's part outside the window counts in the union.
    """
    sums, unit_areas = _templates()

    def cells(length: int, centre: np.ndarray) -> np.ndarray:
        place = (np.arange(length + 1) - centre[:, None]) / radius[:, None]
        index: np.ndarray = np.rint((place + _EXTENT) * (_CELLS / (2 * _EXTENT))).astype(np.intp)
        np.clip(index, 0, _CELLS, out=index)
        return index

    rows, columns = (cells(n, c) for n, c in zip(cover.shape, (y, x), strict=True))
    corners = sums[shape[:, None, None], rows[:, :, None], columns[:, None, :]]
    bands = corners[:, 1:] - corners[:, :-1]
    counts = bands[:, :, 1:] - bands[:, :, :-1]
    heights, widths = (np.maximum(np.diff(edges), 1) for edges in (rows, columns))
    masks = counts / (heights[:, :, None] * widths[:, None, :])
    common: np.ndarray = np.minimum(masks, cover).sum((1, 2))
    union: np.ndarray = unit_areas[shape] * radius**2 + cover.sum() - common
    ratio: np.ndarray = common / union
    return ratio


def _fit(
    cover: np.ndarray, x: float, y: float, area: float
) -> tuple[int, float, float, float, float]:
    """The best template: its index in SHAPES, x, y, radius (pixels), intersection over union.

    All shapes have their centroids at their centres, so the cover's moments place a template;
    where that fits badly, the two best shapes are also tried somewhat displaced and rescaled.
    """
    _, unit_areas = _templates()
    radii = np.sqrt(area / unit_areas.astype(np.float64))
    every = np.arange(len(SHAPES))
    scores = _overlaps(cover, every, np.full(len(every), x), np.full(len(every), y), radii)
    best = int(scores.argmax())
    if scores[best] >= SURE_IOU:
        return best, x, y, float(radii[best]), float(scores[best])
    steps = np.array(list(itertools.product((0.0, -0.06, 0.06), repeat=3)))
    shape = np.repeat(np.argsort(-scores)[:2], len(steps))
    scale, dx, dy = np.tile(steps, (2, 1)).T
    xs, ys, rs = x + dx * radii[shape], y + dy * radii[shape], radii[shape] * (1 + scale)
    scores = _overlaps(cover, shape, xs, ys, rs)
    i = int(scores.argmax())
    return int(shape[i]), float(xs[i]), float(ys[i]), float(rs[i]), float(scores[i])


def score(reading: Reading, caption: Caption) -> tuple[float, float]:
    """The strict (0.0 or 1.0) and the soft score, in [0, 1], of a reading.

    The atoms: of each described object its shape and its colour (any named colour where the
    caption leaves it open), the number of objects, the relation and the background where they
    are described; each object beyond the described number is one more atom, unsatisfied. The
    soft score is the satisfied share under the best assignment of objects; a relation counts
    between two objects with at least one atom each.
    """
    slots = [item for item in caption.items for _ in range(item.count)]
    if caption.relation is not None and len(slots) != 2:
        raise ValueError("a relation needs exactly two objects of count one")
    seen = reading.objects
    atoms = 2 * len(slots) + 1 + max(len(seen) - len(slots), 0)
    held = int(len(seen) == len(slots))
    if caption.background is not None:
        atoms += 1
        held += int(reading.background == caption.background)
    gains = np.array([[_gain(item, o) for o in seen] for item in slots]).reshape(
        len(slots), len(seen)
    )
    if caption.relation is None:
        rows, columns = linear_sum_assignment(gains, maximize=True)
        held += int(gains[rows, columns].sum())
    else:
        atoms += 1
        held += _best_pair(gains, seen, caption.relation)
    return float(held == atoms), held / atoms


def _gain(item: Item, seen: Seen) -> int:
    """How many of an item's two atoms, shape and colour, an object satisfies."""
    colour = seen.colour is not None if item.colour is None else seen.colour == item.colour
    return int(seen.shape == item.shape) + int(colour)


def _best_pair(gains: np.ndarray, seen: Sequence[Seen], relation: str) -> int:
    """The most atoms, the relation's included, that two of the objects (or one) satisfy."""
    best = int(gains.max(initial=0))
    for i, j in itertools.permutations(np.flatnonzero(gains.any(0)).tolist(), 2):
        both = gains[0, i] > 0 and gains[1, j] > 0
        a, b = (seen[i].x, seen[i].y), (seen[j].x, seen[j].y)
        holds = both and relation_holds(relation, a, b)
        best = max(best, int(gains[0, i] + gains[1, j]) + int(holds))
    return best


def strict_score(image: np.ndarray, caption: Caption) -> float:
    """1.0 when a (side, side, 3) uint8 image shows just what the caption says, else 0.0."""
    return score(read_scene(image), caption)[0]


def soft_score(image: np.ndarray, caption: Caption) -> float:
    """The share in [0, 1] of the caption that holds in a (side, side, 3) uint8 image."""
    return score(read_scene(image), caption)[1]


@lru_cache(maxsize=1)
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for caption in captions()}


def caption_from_text(text: str) -> Caption:
    """The caption with this `Caption.text`; ValueError when the world has none."""
    caption = _by_text().get(text)
    if caption is None:
        raise ValueError(
            f"{text!r} is not a caption of the world of shapes, "
            "such as 'a red circle left of an orange cross on black'"
        )
    return caption


def caption_from_metadata(metadata: Mapping[str, object]) -> Caption:
    """The caption with this `Caption.metadata()`; ValueError when the world has none."""
    prompt = metadata.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("the metadata of a caption needs its text under 'prompt'")
    caption = caption_from_text(prompt)
    for key, value in caption.metadata().items():
        if metadata.get(key) != value:
            raise ValueError(f"{prompt!r} has {key} {value!r}, not {metadata.get(key)!r}")
    return caption
