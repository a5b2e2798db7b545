"""What the generator follows at its boundary samples: AC-DMD (METHOD §4), a published baseline
(`BUILTIN`), or one of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from tiltflow.method.boundary import Boundary
from tiltflow.training.own import Kind, guarded, trained_weights
from tiltflow.training.parts import Parts
from tiltflow.training.settings import Options

AC_DMD = "ac_dmd"
BUILTIN = {
    AC_DMD: "tiltflow.training.updates:Matching",
    "decoupled": "tiltflow.training.decoupled:Decoupled",
}
OBJECTIVES = Kind("objective", "tiltflow.objectives", BUILTIN)


@runtime_checkable
class Objective(Protocol):
    """A gradient in x_s that stands for a loss; the fake score is trained beside it either way."""

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        """g, of the shape of `at.x` and without a graph; descending along it is what is wanted.

        Random numbers are draws of (`stream`, `draw`), made for the global batch.
        """


@dataclass(frozen=True)
class Held:
    """An objective from outside: what it raises, gives and writes into. `trained` are the weights
    that its gradient is to reach by the loop's own backward pass."""

    objective: Objective
    trained: tuple[Tensor, ...]

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        """The objective's gradient, held to its shape: a smaller one would be broadcast, and every
        sample follow the same numbers without a word.

        Raises:
            ValueError: naming it, if it is no float tensor of the shape of `at.x`; and as
                `guarded`.
        """
        name = f"objective {type(self.objective).__name__}"
        with guarded(name, (at.x, at.s), self.trained):
            made: object = self.objective.gradient(stream, draw, at)
        if not isinstance(made, Tensor) or made.shape != at.x.shape:
            given = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"{name}: its gradient is {given}, where a tensor of {tuple(at.x.shape)} is needed"
            )
        if not made.is_floating_point() or made.device != at.x.device:
            given = f"{str(made.dtype).removeprefix('torch.')} on {made.device}"
            raise ValueError(
                f"{name}: its gradient is {given}, where floats on {at.x.device} are needed"
            )
        return made.detach()


def make_objective(name: str, options: Options, parts: Parts) -> Objective:
    """The objective `name`: of `BUILTIN`, an entry point of `tiltflow.objectives`, or
    `package.module:Class`, which is called with the stage's parts and the options.

    Raises:
        ValueError: as `check_objective`, or what the constructor says.
    """
    check_objective(name, options)
    if name == AC_DMD:
        return parts.matching
    made = OBJECTIVES.make(name, options, parts)
    assert isinstance(made, Objective)
    return Held(made, trained_weights(parts))


def check_objective(name: str, options: Options) -> None:
    """That there is such an objective, and that it takes these options.

    Raises:
        ValueError: if not.
    """
    if name != AC_DMD:
        if not callable(getattr(OBJECTIVES.check(name, options), "gradient", None)):
            raise ValueError(f"objective {name!r} has no method gradient(stream, draw, at)")
    elif options:
        raise ValueError(f"cold_start.objective_options: {AC_DMD} takes none")
