"""Where counts end: far above any use, and below what would take a machine's memory."""

from __future__ import annotations

MOST_STEPS = 1_000
"""Sampler steps, and what there are at most as many of."""

MOST_SAMPLES = 65_536
"""Samples of a batch."""

MOST_IMAGES = 10_000
"""Images of a fixed set."""

MOST_TOKENS = 4_096
"""Tokens of a prompt."""

LONGEST_SIDE = 4_096
"""Pixels."""

LARGEST_RANK = 4_096
"""Of an adapter."""

STRONGEST_TILT = 1.5
"""Of the dial from stage 1 (0) to stage 2 (1): half as much again as was trained, to see where it
leads."""

LARGEST_SEED = 2**63 - 1
"""torch takes 64 bits, and a few seeds are counted on from a run's."""

FAR = 1_000_000_000
"""Of what takes time alone."""


def check_tilt(what: str, strength: float) -> None:
    """Raises ValueError, naming `what` was given, if `strength` is not on the dial."""
    if not 0 <= strength <= STRONGEST_TILT:
        raise ValueError(
            f"{what} is {strength:g}; it goes from 0 (stage 1) over 1 (stage 2) to {STRONGEST_TILT}"
        )
