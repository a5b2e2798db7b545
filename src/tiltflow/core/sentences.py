"""Sentences: of other libraries' errors, and of counts."""

from __future__ import annotations

import re
from collections.abc import Sequence


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, on one line and without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    begin = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return re.split(r"\.\s+(?=[A-Z])", begin, maxsplit=1)[0].rstrip(".")


def counted(count: int, one: str, several: str | None = None) -> str:
    """1 image, 2 images."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def either(numbers: Sequence[int | str]) -> str:
    """1, 2 or 4."""
    return listed(numbers, "or")


def listed(numbers: Sequence[int | str], last: str = "and") -> str:
    """1, 2 and 4."""
    *others, end = map(str, numbers)
    return f"{', '.join(others)} {last} {end}" if others else end


def printable(text: str, length: int = 300) -> str:
    """Text of others for a terminal or a log: on one line, no longer than `length`, and control
    characters, which a terminal would act on, as their escapes."""
    line = " ".join(text[: 4 * length].split())
    short = line[:length] + ("…" if len(line) > length or len(text) > 4 * length else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
