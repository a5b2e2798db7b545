"""What the generator follows at its boundary samples: AC-DMD (METHOD §4), or one of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.core.registry import find, made
from tiltflow.method.boundary import Boundary
from tiltflow.models.roles import Roles
from tiltflow.train.updates import Matching, Share

GROUP = "tiltflow.objectives"
"""The entry points of objectives from other packages."""
AC_DMD = "ac_dmd"


class Objective(Protocol):
    """A gradient in x_s that stands for a loss; the fake score is trained beside it either way."""

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        """g, of the shape of `at.x` and without a graph; descending along it is what is wanted.

        Random numbers are draws of (`stream`, `draw`), made for the global batch.
        """


@dataclass(frozen=True)
class Setting:
    """What an objective is made with, besides its options."""

    roles: Roles
    randomness: Randomness
    share: Share
    matching: Matching
    """AC-DMD, to build on."""


def make_objective(name: str, options: Mapping[str, Any], setting: Setting) -> Objective:
    """The objective `name`: "ac_dmd", an entry point of `tiltflow.objectives`, or
    `package.module:Class`, which is called with the setting and the options.

    Raises:
        ValueError: if there is none, or it does not take the options.
    """
    if name == AC_DMD:
        if options:
            raise ValueError(f"cold_start.objective_options: {AC_DMD} takes none")
        return setting.matching
    kind: Any = find("objective", name, GROUP, [AC_DMD], "Class")
    objective: Objective = made("objective", name, kind, setting=setting, **options)
    return objective
