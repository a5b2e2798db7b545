"""The false captions of the embedded teacher's training (scripts/assets/data.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tiltflow.rewards.worlds import shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from assets.data import false_captions

TEXTS = sorted(
    caption.text
    for category in ("single_object", "counting", "colors")
    for caption in shapes.split(held_out=False)[category]
)


def test_they_are_captions_of_the_split_and_nearly_always_wrong() -> None:
    rows = false_captions(TEXTS, each=4, seed=0)
    assert rows.shape == (len(TEXTS), 4)
    assert rows.min() >= 0 and rows.max() < len(TEXTS)
    own = np.arange(len(TEXTS))[:, None]
    assert (rows != own).mean() > 0.95
    assert np.array_equal(rows, false_captions(TEXTS, each=4, seed=0))
    assert not np.array_equal(rows, false_captions(TEXTS, each=4, seed=1))


def test_one_without_near_misses_stays_as_it_is() -> None:
    assert false_captions(TEXTS[:1], each=3, seed=0).tolist() == [[0, 0, 0]]


def test_a_caption_of_the_other_split_is_refused() -> None:
    with pytest.raises(KeyError):
        false_captions([shapes.balanced(True, 1)[0].text], each=1, seed=0)
