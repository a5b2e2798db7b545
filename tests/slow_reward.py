"""A reward that waits, for runs that are to last a known while however fast the machine is."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def slow_x(images: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """The first coordinate of points, after half a second or, once the file $HURRY is there, at
    once."""
    if not Path(os.environ["HURRY"]).exists():
        time.sleep(0.5)
    return images[:, 0]


slow_x.domain = "points"  # type: ignore[attr-defined]
slow_x.differentiable = True  # type: ignore[attr-defined]
