"""A win rate with an interval that holds while one looks: at every vote, whenever one stops.

An interval for a fixed number of votes (Wilson's) misses the truth far more often than stated when
one looks after every vote and stops as one likes. A confidence sequence does not: with probability
`level` it holds the truth at all times together.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]

GRID = 512
MIDDLE = (0.1, 0.9)
"""The rates between which most of the weight lies, and how much of it."""
MIDDLE_SHARE = 0.9


def _weights() -> tuple[Array, Array]:
    """Rates (2 × GRID,) and the logarithms of their weights: even in arcsin √rate (Jeffreys'
    choice, for which the width is the same multiple of Wilson's at all rates), more in the middle.
    """
    rates, logs = [], []
    for (low, high), share in ((MIDDLE, MIDDLE_SHARE), ((0.0, 1.0), 1 - MIDDLE_SHARE)):
        ends = np.arcsin(np.sqrt([low, high]))
        places = ends[0] + (np.arange(GRID) + 0.5) / GRID * (ends[1] - ends[0])
        rates.append(np.sin(places) ** 2)
        logs.append(np.full(GRID, math.log(share / GRID)))
    return np.concatenate(rates), np.concatenate(logs)


_RATES, _LOGS = _weights()


def log_evidence(wins: ArrayLike, losses: ArrayLike, rate: float) -> Array:
    """How strongly votes speak against `rate`: the logarithm of the mixture of likelihood ratios
    ∫ (q/p)^wins ((1−q)/(1−p))^losses w(q) dq with p = `rate` in (0, 1).

    If every vote has mean p, this is a nonnegative supermartingale that starts at 1, so by Ville's
    inequality it ever exceeds 1/α with probability α at most (Robbins 1970, Ann. Math. Stat. 41,
    1397; Howard, Ramdas, McAuliffe and Sekhon 2021, Ann. Stat. 49, 1055). A tie counts half to each
    side: a^x b^(1−x) ≤ x a + (1−x) b for x in [0, 1], so it stays one.
    """
    won, lost = np.asarray(wins, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    terms = _LOGS + won[..., None] * np.log(_RATES) + lost[..., None] * np.log1p(-_RATES)
    mixture: Array = np.logaddexp.reduce(terms, axis=-1)
    return mixture - won * math.log(rate) - lost * math.log1p(-rate)


def win_rate_interval(wins: float, losses: float, level: float = 0.95) -> tuple[float, float]:
    """The confidence sequence of a win rate at (`wins`, `losses`), ties counted half to each.

    At 200 votes it is at most 1.7 times as wide as Wilson's for rates from .15 to .85.

    Raises:
        ValueError: if a count is negative or no number, or the level not in (0, 1).
    """
    if not (0 <= wins < math.inf and 0 <= losses < math.inf):
        raise ValueError(f"a win rate of {wins} wins and {losses} losses")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must lie in (0, 1), got {level}")
    if wins + losses == 0:
        return 0.0, 1.0
    limit, tiny = -math.log1p(-level), 1e-12
    middle = min(max(wins / (wins + losses), tiny), 1 - tiny)

    def beyond(rate: float) -> float:
        return float(log_evidence(wins, losses, rate)) - limit

    low = 0.0 if beyond(tiny) <= 0 else brentq(beyond, tiny, middle)
    high = 1.0 if beyond(1 - tiny) <= 0 else brentq(beyond, middle, 1 - tiny)
    return low, high
