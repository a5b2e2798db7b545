"""What is asked of an export: the formats, and the strengths at which the tilt is baked in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tiltflow.core.limits import check_tilt

Format = Literal["diffusers", "comfyui", "peft", "kohya", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)
FileType = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Wanted:
    """Formats without repetition; strengths of stage 2 in [0, 1.5] to bake, none for its own file
    alone; `dtype` of the merged transformer's one file, None for that of the base in training.

    Raises:
        ValueError: naming what is none of them.
    """

    formats: tuple[Format, ...] = ("diffusers",)
    strengths: tuple[float, ...] = ()
    dtype: FileType | None = None

    def __post_init__(self) -> None:
        odd = [name for name in self.formats if name not in FORMATS]
        if odd or not self.formats:
            said = repr(odd[0]) if odd else "empty"
            raise ValueError(f"--for is {said}; it is one of {', '.join(FORMATS)}")
        for strength in self.strengths:
            check_tilt("--tilt", strength)
        names = [f"{strength:g}" for strength in self.strengths]
        same = [name for name in names if names.count(name) > 1]
        if same:
            raise ValueError(
                f"--tilt has two strengths that both read {same[0]}, and files are called by them"
            )
        if self.dtype not in (None, *get_args(FileType)):
            raise ValueError(f"--dtype is {self.dtype!r}; it is bf16 or fp8")
        if self.dtype is not None and "merged" not in self.formats:
            raise ValueError("--dtype is of the merged transformer: ask for it with --for merged")

    @classmethod
    def of(
        cls, formats: Sequence[str] = (), tilt: str | None = None, dtype: str | None = None
    ) -> Wanted:
        """What the command line says.

        Raises:
            ValueError: also if `tilt` is no number, nor several with commas between them.
        """
        kept = tuple(dict.fromkeys(formats)) or ("diffusers",)
        strengths = () if tilt is None else tuple(dict.fromkeys(_strengths(tilt)))
        return cls(kept, strengths, dtype)  # type: ignore[arg-type]  # checked there


def _strengths(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if any(math.isnan(value) for value in found):
        raise ValueError(f"--tilt is {text!r}; give a number such as .7, or several: 0,.5,1")
    return found
