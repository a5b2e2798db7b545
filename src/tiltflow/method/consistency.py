"""The consistency (martingale) regulariser of the fake score (METHOD §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.flow import cps_step, x0_from_velocity
from tiltflow.method.distribution_matching import Field

FORMS = ("two_sample", "one_sample")


def consistency_loss(
    fake_score: Field,
    x_t: Tensor,
    t: Tensor,
    v_t: Tensor,
    t_next: Tensor,
    noise: tuple[Tensor, Tensor],
    eta: float,
    form: str = "two_sample",
) -> Tensor:
    """The squared gap of E[h(x_{t'}, t') given x_t] = h(x_t, t) with h = x − t v_φ: (B,).

    `v_t` is v_φ(x_t, t) with its graph; `t_next` = max(t − δ, 0). Two transitions with
    independent `noise` give the unbiased two-sample estimator, which may be negative on a sample;
    "one_sample" squares the first one's gap: biased by the transition's variance, never negative.
    The transitions themselves carry no gradient.

    Raises:
        ValueError: on an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"consistency form {form!r} is none of {', '.join(FORMS)}")
    h_t = x0_from_velocity(x_t, v_t, t)
    draws = noise if form == "two_sample" else noise[:1]
    with torch.no_grad():
        moved = torch.cat([cps_step(x_t, v_t, t, t_next, eta, z) for z in draws])
    level = t_next.repeat(len(draws))
    gaps = x0_from_velocity(moved, fake_score(moved, level), level).chunk(len(draws))
    first, last = gaps[0] - h_t, gaps[-1] - h_t
    return (first * last).flatten(1).mean(1)
