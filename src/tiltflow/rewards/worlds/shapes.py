"""The world of shapes: captions, scenes and a renderer for the embedded default.

A caption belongs to one of GenEval's six categories (single object, two objects, counting,
colours, position, attribute binding). A scene is a list of placed objects on a plain
background; the renderer draws it anti-aliased. Reading an image back is `shapes_checker`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 30),
    "green": (40, 160, 60),
    "cyan": (30, 200, 220),
    "blue": (40, 70, 220),
    "purple": (130, 50, 180),
    "pink": (250, 130, 190),
}
DEFAULT_COLOUR = "blue"  # of objects that the caption gives none
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (16, 16, 16), "white": (240, 240, 240)}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three"}
HELD_OUT_SHARE = 0.2

# The reach of a shape (its farthest point) in units of its nominal radius.
REACH = {"circle": 1.0, "square": 1.25, "triangle": 1.35, "cross": 1.2}
# Objects stand in the four quarters of the frame, one each, a little off the quarter's centre;
# their reach as a share of the image's side.
_CENTRES = tuple((x, y) for x in (0.25, 0.75) for y in (0.25, 0.75))
_JITTER = 0.035
REACHES = (0.16, 0.205)


@dataclass(frozen=True)
class Item:
    """One noun phrase of a caption: `count` objects of `shape`, of `colour` when it is named."""

    shape: str
    colour: str | None = None
    count: int = 1

    def text(self) -> str:
        words = [] if self.colour is None else [self.colour]
        if self.count > 1:
            plural = self.shape + ("es" if self.shape.endswith("s") else "s")
            return " ".join([COUNTS[self.count], *words, plural])
        first = words[0] if words else self.shape
        return " ".join(["an" if first[0] in "aeiou" else "a", *words, self.shape])


@dataclass(frozen=True)
class Caption:
    """What an image should show: one or two items, perhaps a relation, perhaps a background."""

    category: str
    items: tuple[Item, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def text(self) -> str:
        joint = f" {self.relation} " if self.relation else " and "
        text = joint.join(item.text() for item in self.items)
        return text if self.background is None else f"{text} on {self.background}"

    def metadata(self) -> dict[str, object]:
        """The caption in GenEval's metadata format, with the world's two extra fields."""
        include = [
            {"class": i.shape, "count": i.count} | ({"color": i.colour} if i.colour else {})
            for i in self.items
        ]
        return {
            "tag": self.category,
            "include": include,
            "relation": self.relation,
            "background": self.background,
            "prompt": self.text,
        }

    def split_key(self) -> str:
        """What decides the split: equal for captions that describe the same combination."""
        named = [f"{i.count} {i.colour} {i.shape}" for i in self.items]
        if self.relation in ("right of", "below"):
            named.reverse()
        if self.relation is None:
            named.sort()
        axis = {"left of": "across", "right of": "across", "above": "down", "below": "down"}
        # Where a category has few combinations, the background takes part in them.
        few = self.category in ("single_object", "two_object", "colors", "counting")
        ground = self.background if few else None
        return f"{self.category}|{'|'.join(named)}|{axis.get(self.relation or '')}|{ground}"

    @property
    def held_out(self) -> bool:
        digest = hashlib.blake2b(self.split_key().encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2**32 < HELD_OUT_SHARE


@dataclass(frozen=True)
class Placed:
    """An object in a scene; centre and nominal radius as shares of the image's side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Placed, ...]
    background: str


def captions() -> Iterator[Caption]:
    """Every caption of the world, both splits."""
    grounds = (None, *BACKGROUNDS)
    pairs = list(itertools.product(COLOURS, SHAPES))
    for ground in grounds:
        for shape in SHAPES:
            yield Caption("single_object", (Item(shape),), None, ground)
        for a, b in itertools.permutations(SHAPES, 2):
            yield Caption("two_object", (Item(a), Item(b)), None, ground)
        for colour, shape in pairs:
            yield Caption("colors", (Item(shape, colour),), None, ground)
        for n, shape, tint in itertools.product(COUNTS, SHAPES, (None, *COLOURS)):
            yield Caption("counting", (Item(shape, tint, n),), None, ground)
        for (ca, sa), (cb, sb) in itertools.permutations(pairs, 2):
            items = (Item(sa, ca), Item(sb, cb))
            yield Caption("color_attr", items, None, ground)
            for relation in RELATIONS:
                yield Caption("position", items, relation, ground)


def split(held_out: bool) -> dict[str, list[Caption]]:
    """The captions of one split, by category."""
    table: dict[str, list[Caption]] = {name: [] for name in CATEGORIES}
    for caption in captions():
        if caption.held_out == held_out:
            table[caption.category].append(caption)
    return table


def balanced(held_out: bool, n: int, seed: int = 0) -> list[Caption]:
    """`n` captions of one split, the six categories in equal shares, each shuffled by `seed`.

    A category with fewer captions than its share starts again from its beginning.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    table = split(held_out)
    orders = {name: [table[name][i] for i in rng.permutation(len(table[name]))] for name in table}
    chosen = []
    for i in range(n):
        order = orders[CATEGORIES[i % len(CATEGORIES)]]
        chosen.append(order[(i // len(CATEGORIES)) % len(order)])
    return chosen


def relation_holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether the centre `a` stands in `relation` to the centre `b` (x to the right, y down)."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > 0.1 and along > abs(across)


def sample_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """A scene that the caption describes exactly: nothing more, nothing less.

    Objects that the caption gives no colour are blue; a background it does not name is drawn.
    """
    kinds = [(i.shape, i.colour or DEFAULT_COLOUR) for i in caption.items for _ in range(i.count)]
    ground = caption.background or str(rng.choice(list(BACKGROUNDS)))
    while True:
        quarters = rng.permutation(len(_CENTRES))[: len(kinds)]
        objects = tuple(place(k, _CENTRES[q], rng) for k, q in zip(kinds, quarters, strict=True))
        if caption.relation is None or _clear(caption.relation, objects):
            return Scene(objects, ground)


def place(kind: tuple[str, str], centre: tuple[float, float], rng: np.random.Generator) -> Placed:
    """An object of a (shape, colour), of a drawn size, near a quarter's centre."""
    (shape, colour), (x, y) = kind, centre + rng.uniform(-_JITTER, _JITTER, 2)
    return Placed(shape, colour, float(x), float(y), rng.uniform(*REACHES) / REACH[shape])


def free_places(scene: Scene) -> list[tuple[float, float]]:
    """The centres of the quarters that no object of the scene is in."""
    taken = [min(_CENTRES, key=lambda c: math.hypot(c[0] - o.x, c[1] - o.y)) for o in scene.objects]
    return [centre for centre in _CENTRES if centre not in taken]


def _clear(relation: str, objects: tuple[Placed, ...]) -> bool:
    """Whether the first two objects stand in the relation, and in no other."""
    a, b = ((o.x, o.y) for o in objects[:2])
    near, far = sorted((abs(a[0] - b[0]), abs(a[1] - b[1])))
    return relation_holds(relation, a, b) and near <= 0.7 * far


def _inside_polygon(u: np.ndarray, v: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Even-odd test of points against a polygon, all in units of the radius."""
    inside = np.zeros(u.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = ((y0 > v) != (y1 > v)) & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
            inside ^= crosses
    return inside


_TRIANGLE = np.array(
    [(1.35 * math.cos(a), 1.35 * math.sin(a)) for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)]
)


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (in units of the nominal radius, y down) lie inside the shape."""
    if shape == "circle":
        return u * u + v * v <= 1.0
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.88
    if shape == "cross":
        near, far = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
        return (near <= 0.36) & (far <= 1.13)
    return _inside_polygon(u, v, _TRIANGLE)


def render(scene: Scene, size: int = SIZE, supersample: int = 3) -> np.ndarray:
    """The scene as an (size, size, 3) uint8 image, anti-aliased by `supersample`²."""
    image = np.empty((size, size, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        reach = o.radius * REACH[o.shape] * size + 1
        x0, x1 = max(int(o.x * size - reach), 0), min(int(o.x * size + reach) + 2, size)
        y0, y1 = max(int(o.y * size - reach), 0), min(int(o.y * size + reach) + 2, size)
        grid_x = x0 + (np.arange((x1 - x0) * supersample) + 0.5) / supersample
        grid_y = y0 + (np.arange((y1 - y0) * supersample) + 0.5) / supersample
        u = (grid_x[None, :] / size - o.x) / o.radius
        v = (grid_y[:, None] / size - o.y) / o.radius
        mask = inside(o.shape, *np.broadcast_arrays(u, v)).astype(np.float32)
        mask = mask.reshape(y1 - y0, supersample, x1 - x0, supersample).mean((1, 3))[..., None]
        patch = image[y0:y1, x0:x1]
        patch += mask * (np.array(COLOURS[o.colour], dtype=np.float32) - patch)
    return np.round(image).astype(np.uint8)
