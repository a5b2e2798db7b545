"""Other libraries' errors in a sentence."""

from __future__ import annotations

import re


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, on one line and without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    begin = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return re.split(r"\.\s+(?=[A-Z])", begin, maxsplit=1)[0].rstrip(".")
