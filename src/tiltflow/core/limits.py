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

LARGEST_SEED = 2**63 - 1
"""torch takes 64 bits, and a few seeds are counted on from a run's."""

FAR = 1_000_000_000
"""Of what takes time alone."""
