"""A win rate with an interval that holds while one looks: at every vote, whenever one stops.

An interval for a fixed number of votes (Wilson's) misses the truth far more often than stated when
one looks after every vote and stops as one likes. A confidence sequence does not: with probability
`level` it holds the truth at all times together.
"""

from __future__ import annotations

import math

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

PRIOR_VOTES = 20.0
"""How many votes the prior around a rate is worth: about a tenth of the votes for which the
interval is to be narrow, here 200."""


def log_evidence(wins: ArrayLike, losses: ArrayLike, rate: float) -> Array:
    """How strongly votes speak against a `rate` p in (0, 1): the logarithm of the mixture of
    likelihood ratios ∫ (q/p)^wins ((1−q)/(1−p))^losses Beta(q; c p, c (1−p)) dq, c `PRIOR_VOTES`.

    If every vote has mean p, this is a nonnegative supermartingale that starts at 1, so by Ville's
    inequality it ever exceeds 1/α with probability α at most (Robbins 1970, Ann. Math. Stat. 41,
    1397; the mixture is the beta-binomial one of Howard, Ramdas, McAuliffe and Sekhon 2021, Ann.
    Stat. 49, 1055). A tie counts half to each side: a^x b^(1−x) ≤ x a + (1−x) b for x in [0, 1],
    so it stays one. The prior may have its mean at p, as each rate is tested by itself.
    """
    won, lost = np.asarray(wins, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    a, b = PRIOR_VOTES * rate, PRIOR_VOTES * (1 - rate)
    mixture: Array = scipy.special.betaln(a + won, b + lost) - scipy.special.betaln(a, b)
    return mixture - won * math.log(rate) - lost * math.log1p(-rate)


def win_rate_interval(wins: float, losses: float, level: float = 0.95) -> tuple[float, float]:
    """The confidence sequence of a win rate at (`wins`, `losses`), ties counted half to each.

    At 200 votes it is at most 1.56 times as wide as Wilson's, whatever the rate.

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

    low = 0.0 if beyond(tiny) <= 0 else scipy.optimize.brentq(beyond, tiny, middle)
    high = 1.0 if beyond(1 - tiny) <= 0 else scipy.optimize.brentq(beyond, middle, 1 - tiny)
    return low, high
