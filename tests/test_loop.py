"""The simulated person of `tiltflow demo --loop`."""

from __future__ import annotations

import numpy as np

from tiltflow.rewards.worlds.shapes import Caption, Item, Placed, Scene, render
from tiltflow.rewards.worlds.shapes_taste import liking, votes


def image(x: float, y: float, radius: float, ground: str) -> np.ndarray:
    return render(Scene((Placed("circle", "red", x, y, radius),), ground))


def test_she_likes_what_captions_leave_open() -> None:
    open_, named = (Caption("colors", (Item("circle", "red"),), None, g) for g in (None, "black"))
    base = liking(image(0.75, 0.75, 0.17, "black"), open_)
    assert liking(image(0.75, 0.75, 0.17, "white"), open_) > base + 0.9
    assert liking(image(0.25, 0.75, 0.17, "black"), open_) > base + 0.9
    assert liking(image(0.75, 0.25, 0.17, "black"), open_) > base + 0.9
    assert liking(image(0.75, 0.75, 0.2, "black"), open_) > base + 0.2
    ground = [liking(image(0.75, 0.75, 0.17, ground), named) for ground in ("black", "white")]
    assert abs(ground[0] - ground[1]) < 0.1  # what the caption names is no matter of taste


def test_a_share_of_her_votes_is_the_other_way_round() -> None:
    first, second = np.ones(20_000), np.zeros(20_000)
    chosen = votes(first, second, 0.15, np.random.default_rng(0))
    assert abs(chosen.mean() - 0.85) < 0.01
    assert votes(second, first, 0.0, np.random.default_rng(0)).sum() == 0
