"""GenEval's partial credit on hand-made detections."""

from __future__ import annotations

from typing import Any

import pytest
from test_rewards_geneval import need, thing, told

from tiltflow.rewards.zoo.geneval_rules import grade, scene_of

CUPS = {"tag": "counting", "include": [need("cup", 3)], "exclude": [need("cup", 4)]}
RED = {"tag": "colors", "include": [need("cup", 2, color="red")]}
SIDE = {
    "tag": "position",
    "include": [need("dog"), need("cup", position=["left of", 0])],
}
DOG = thing("dog", (100, 0, 120, 20))
LEFT, RIGHT = thing("cup", (0, 0, 20, 20)), thing("cup", (200, 0, 220, 20))


@pytest.mark.parametrize(
    ("scene", "objects", "credit"),
    [
        (CUPS, [thing("cup")] * 3, 1.0),  # exact
        (CUPS, [thing("cup")] * 4, 2 / 3),  # too many
        (CUPS, [thing("cup")] * 9, -1.0),  # far too many
        (CUPS, [thing("cup")] * 1, 1 / 3),  # too few
        (CUPS, [], 0.0),  # missing
        (CUPS, [thing("cup", score=0.9)] * 3, 0.0),  # numbers are judged on sure objects
        (RED, [thing("cup", colour="red")] * 2, 1.0),
        (RED, [thing("cup", colour="red"), thing("cup", colour="blue")], 0.75),  # one wrong colour
        (RED, [thing("cup", colour="blue")] * 2, 0.5),  # wrong colour
        (RED, [thing("cup", colour="red")] * 3, 0.25),  # (1/2 + 0)/2: no colour for a wrong number
        (SIDE, [DOG, LEFT], 1.0),
        (SIDE, [DOG, RIGHT], 0.75),  # wrong side: 1, 1, and the 0 with the 1 beside it
        (SIDE, [LEFT], (0 + 1 + 0) / 3),  # nothing to be left of
        (SIDE, [DOG], (1 + 0 + 0) / 3),  # missing
        (SIDE, [DOG, LEFT, LEFT], (1 + 0 + 0) / 3),  # too many: no credit for the side
    ],
)
def test_graded_geneval(scene: dict[str, Any], objects: list[Any], credit: float) -> None:
    assert grade(scene_of(scene, "p"), objects, told) == pytest.approx(credit)
