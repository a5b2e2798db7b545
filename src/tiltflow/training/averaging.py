"""When and how fast the generator's average follows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Averaging:
    """ema ← d · ema + (1 − d) · generator, after the counts n with n + 1 divisible by `interval`.

    A count is a generator update, or with `every` = "iteration" an iteration: in stage 1 most of
    these leave the generator as it is, and the average draws nearer to it all the same. `warmup`
    has d rise with the count, as (1 + n)/(10 + n) up to `decay`. `repeats` is how many times one
    step of the average is taken at once.

    The published stage 1 averages each iteration; its stage 2, after its 7th, 15th, … update, 16
    times at once and with the warm-up.
    """

    decay: float
    every: str = "update"
    warmup: bool = False
    interval: int = 1
    repeats: int = 1

    def at(self, count: int) -> float | None:
        """d of the average's step after `count` (1, 2, …); None where it takes none."""
        if (count + 1) % self.interval:
            return None
        one = min((1 + count) / (10 + count), self.decay) if self.warmup else self.decay
        return one**self.repeats
