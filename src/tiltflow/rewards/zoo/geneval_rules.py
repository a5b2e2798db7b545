"""GenEval's verdict on an image, given what a detector found in it (arXiv 2310.11513).

The rules and their numbers are those of `evaluation/evaluate_images.py` in djghosh13/geneval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltflow.core.paths import nearest

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # prompts that ask for a number are judged by sure detections only
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # share of the two objects' sizes by which their centres must differ
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
POSITIONS = ("left of", "right of", "above", "below")
KEYS = {"class", "count", "color", "position"}

CLASSES = frozenset(
    """person/bicycle/car/motorcycle/airplane/bus/train/truck/boat/traffic light/fire hydrant/
    stop sign/parking meter/bench/bird/cat/dog/horse/sheep/cow/elephant/bear/zebra/giraffe/backpack/
    umbrella/handbag/tie/suitcase/frisbee/skis/snowboard/sports ball/kite/baseball bat/
    baseball glove/skateboard/surfboard/tennis racket/bottle/wine glass/cup/fork/knife/spoon/bowl/
    banana/apple/sandwich/orange/broccoli/carrot/hot dog/pizza/donut/cake/chair/couch/potted plant/
    bed/dining table/toilet/tv/laptop/computer mouse/tv remote/computer keyboard/cell phone/
    microwave/oven/toaster/sink/refrigerator/book/clock/vase/scissors/teddy bear/hair drier/
    toothbrush""".replace("\n    ", "").split("/")
)
"""COCO's 80 things under GenEval's names (`object_names.txt`)."""

# What detectors call those that GenEval calls otherwise: COCO's own names, and those of the label
# file that transformers' Mask2Former and RT-DETR were converted with (after mmdet and YOLO).
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "tv monitor": "tv",
    "hair dryer": "hair drier",
}


@dataclass(frozen=True)
class Detection:
    """An object of a class: confidence, box (left, top, right, bottom) in pixels, and its mask."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None


@dataclass(frozen=True)
class Clause:
    """At least (`include`) or fewer than (`exclude`) `count` objects of `label`; with a colour,
    all of them of it; with a position (relation, index), each so to every object of that clause."""

    label: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Scene:
    """What a GenEval prompt asks for."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    counting: bool = False

    @property
    def threshold(self) -> float:
        return COUNTING_THRESHOLD if self.counting else THRESHOLD


Colours = Callable[[Sequence[Detection], str], Sequence[str]]
"""The colours of the objects of one class, which is named."""


def scene_of(metadata: Mapping[str, object], prompt: str) -> Scene:
    """The scene of GenEval's metadata.

    Raises:
        ValueError: naming the prompt, if there are none or they do not make sense.
    """
    include = _clauses(metadata.get("include"), prompt)
    if not include:
        raise ValueError(f"{prompt!r} has no GenEval metadata (an `include` list)")
    for index, clause in enumerate(include):
        if clause.position is not None and clause.position[1] >= index:
            raise ValueError(f"{prompt!r}: a position must refer to an earlier object")
    exclude = _clauses(metadata.get("exclude", []), prompt)
    return Scene(include, exclude, metadata.get("tag") == "counting")


def _clauses(raw: object, prompt: str) -> tuple[Clause, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise ValueError(f"{prompt!r}: include and exclude must be lists, got {raw!r}")
    return tuple(_clause(item, prompt) for item in raw)


def _clause(raw: object, prompt: str) -> Clause:
    wrong = ValueError(f"{prompt!r}: {raw!r} is no GenEval clause")
    if not isinstance(raw, Mapping) or not {"class", "count"} <= raw.keys() <= KEYS:
        raise wrong
    label, count, colour = raw["class"], raw["count"], raw.get("color")
    position = raw.get("position")
    if not isinstance(label, str) or type(count) is not int or count < 1:
        raise wrong
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{prompt!r}: {colour!r} is none of GenEval's colours")
    if position is None:
        return Clause(label, count, colour)
    if not isinstance(position, Sequence) or len(position) != 2:
        raise wrong
    relation, target = position
    if relation not in POSITIONS or type(target) is not int or target < 0:
        raise wrong
    return Clause(label, count, colour, (relation, target))


def check_classes(scene: Scene, known: Collection[str], prompt: str) -> None:
    """Passes a scene of the classes that a detector knows.

    Raises:
        ValueError: naming the prompt, and the first class that it does not.
    """
    for clause in (*scene.include, *scene.exclude):
        if clause.label not in known:
            hint = nearest(clause.label, sorted(known))
            raise ValueError(f"{prompt!r}: the detector knows no {clause.label!r}{hint}")


def kept(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """By class the detections above the threshold, the surest first, at most 16 of each."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            found.setdefault(detection.label, []).append(detection)
    return {label: objects[:MAX_OBJECTS] for label, objects in found.items()}


def judge(scene: Scene, detections: Sequence[Detection], colours: Colours) -> list[str]:
    """Why the image does not show the scene: no reasons if it does.

    Of a class the `count` surest detections are the ones that colour and position are asked of.
    """
    objects = kept(detections, scene.threshold)
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in scene.include:
        found = objects.get(clause.label, [])[: clause.count]
        reason = _mismatch(clause, found, matched, colours)
        if reason is not None:
            reasons.append(reason)
        matched.append(None if reason else found)
    for clause in scene.exclude:
        number = len(objects.get(clause.label, []))
        if number >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.label}, found {number}")
    return reasons


def grade(scene: Scene, detections: Sequence[Detection], colours: Colours) -> float:
    """How nearly the image shows the scene: 1 if it does, the mean of parts of credit if not.

    A training reward: a number that is wrong by one is better than one that is wrong by two, and
    exactly the number asked for is right, so that more objects than that cost credit without end
    (what `exclude` is for in the verdict). The parts of a clause that asks for n objects:

    - 1 − |n − found| / n for the number, and where it is wrong, 0 for colour and position together;
    - where it is right, 1 − |n − of the colour| / n for the colour;
    - and with the colour right, for the position, a 1, and a 0 beside it if some pair is placed
      otherwise; or only a 0 if the objects to compare with are not as they should be.

    These are the parts of the authors' reward. A wrong side has the 1 beside its 0 there too.
    """
    objects = kept(detections, scene.threshold)
    parts: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in scene.include:
        found = objects.get(clause.label, [])
        credit, right = _credit(clause, found, matched, colours)
        parts += credit
        matched.append(found if right else None)
    return sum(parts) / len(parts)


def _credit(
    clause: Clause,
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colours: Colours,
) -> tuple[list[float], bool]:
    """A clause's parts of credit, and whether all of it holds."""
    parts = [_share(clause.count, len(found))]
    if len(found) != clause.count:
        more = clause.colour is not None or clause.position is not None
        return parts + [0.0] * more, False
    if clause.colour is not None:
        right = list(colours(found, clause.label)).count(clause.colour)
        parts.append(_share(clause.count, right))
        if right != clause.count:
            return parts, False
    if clause.position is None:
        return parts, True
    relation, target = clause.position
    others = matched[target]
    if others is None:
        return [*parts, 0.0], False
    if all(relation in relative_position(one, other) for one in found for other in others):
        return [*parts, 1.0], True
    return [*parts, 0.0, 1.0], False


def _share(wanted: int, found: int) -> float:
    return 1 - abs(wanted - found) / wanted


def _mismatch(
    clause: Clause,
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colours: Colours,
) -> str | None:
    """Why the clause does not hold, or None."""
    if len(found) < clause.count:
        return f"expected {clause.count} {clause.label}, found {len(found)}"
    if clause.colour is not None:
        seen = list(colours(found, clause.label))
        if seen.count(clause.colour) < clause.count:
            return f"expected {clause.count} {clause.colour} {clause.label}, found {seen}"
    if clause.position is None:
        return None
    relation, target = clause.position
    others = matched[target]
    if others is None:
        return f"there is nothing for {clause.label} to be {relation}"
    for one in found:
        for other in others:
            relations = relative_position(one, other)
            if relation not in relations:
                return f"expected {clause.label} {relation} the other, found {sorted(relations)}"
    return None


def relative_position(one: Detection, other: Detection) -> set[str]:
    """Where `one` is as seen from `other`: any of the four relations, two at a diagonal.

    The distance of the centres on each axis is shortened by a tenth of the two objects' summed
    sizes; what is left counts where it is more than half of the distance of the centres.
    """
    offsets, revised = [], []
    for axis in (0, 1):
        low_a, high_a = one.box[axis], one.box[axis + 2]
        low_b, high_b = other.box[axis], other.box[axis + 2]
        offset = (low_a + high_a) / 2 - (low_b + high_b) / 2
        sizes = abs(high_a - low_a) + abs(high_b - low_b)
        left = max(abs(offset) - POSITION_THRESHOLD * sizes, 0)
        offsets.append(offset)
        revised.append(math.copysign(left, offset))
    if all(abs(value) < 1e-3 for value in revised):
        return set()
    dx, dy = (value / math.hypot(*offsets) for value in revised)
    held = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, holds in zip(POSITIONS, held, strict=True) if holds}
