"""The K-step sampler as a trajectory record (METHOD §2, §5).

A rollout is made without gradient; the losses then re-attach single steps to the graph with
`attach`, so that memory holds one step's activations whatever K is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.core.transfer import to_device
from tiltflow.flow import broadcast, cps_mean_std
from tiltflow.models.backbone import Conditioning, Grouped

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""v(x, σ, conditioning): a role, or anything that behaves like one."""

LOG_PROBS = ("unit", "gaussian")


class Kept(NamedTuple):
    """A sampler step with its graph, from its state `x` alone: its mean and std."""

    x: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Graphs:
    """The steps whose graphs a rollout keeps, by micro-batches; those in `through` take a gradient
    at their state, which goes on to the step before."""

    kept: Mapping[int, list[Kept]]
    through: Collection[int] = ()

    @classmethod
    def of(cls, spans: Iterable[range]) -> Graphs:
        """For the gradient of each of these spans of successive steps."""
        every = list(spans)
        steps = sorted({k for span in every for k in span})
        return cls({k: [] for k in steps}, {k for span in every for k in span[1:]})

    def take(self) -> dict[int, Kept]:
        """The next micro-batch's."""
        return {k: parts.pop(0) for k, parts in self.kept.items()}


NO_GRAPHS = Graphs(MappingProxyType({}))


@dataclass(frozen=True)
class Rollout:
    """Trajectories of B samples over the grid σ₀ > … > σ_K = 0, K ≥ 1.

    `states[k]` is x at level σ_k, (B, ...) fp32, for those k of 0..K' that were kept, K' ≤ K being
    the last executed step and always kept; `sigmas` is (K + 1,). `log_probs[k]` (B,) was recorded
    while sampling. The conditioning of a whole batch may be `Grouped`; that of the rows that a
    network sees is not.
    """

    sigmas: Tensor
    states: Mapping[int, Tensor]
    cond: Conditioning | Grouped
    eta: float
    log_probs: Mapping[int, Tensor] = field(default_factory=dict)

    def rows(self, rows: slice) -> Rollout:
        """The trajectories of some samples."""
        states = {k: state[rows] for k, state in self.states.items()}
        recorded = {k: value[rows] for k, value in self.log_probs.items()}
        return Rollout(self.sigmas, states, self.cond[rows], self.eta, recorded)

    @property
    def conditioning(self) -> Conditioning:
        """`cond`, as networks take it."""
        assert isinstance(self.cond, Conditioning)
        return self.cond

    @property
    def steps(self) -> int:
        """The number of executed steps."""
        return max(self.states)

    @property
    def end(self) -> Tensor:
        """The samples after the last executed step: (B, ...)."""
        return self.states[self.steps]

    def level(self, k: int) -> Tensor:
        """σ_k for every sample: (B,)."""
        return self.sigmas[k].expand(len(self.end))


def step(
    velocity: Velocity, x: Tensor, sigmas: Tensor, k: int, cond: Conditioning, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and std of step k, from σ_k to σ_{k+1} (METHOD §2)."""
    now, then = (s.to(x.device).expand(len(x)) for s in (sigmas[k], sigmas[k + 1]))
    return cps_mean_std(x, velocity(x, now, cond), now, then, eta)


def stochastic(sigmas: Tensor, k: int, eta: float) -> bool:
    """Whether step k draws noise: none does with η = 0, nor the last of the grid."""
    return eta > 0 and k < len(sigmas) - 2


def _drawn(mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """The state after a step; `noise` is None for a deterministic one."""
    return mean if noise is None else mean + std * noise.to(mean)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    cond: Conditioning,
    eta: float,
    noise: Callable[[int], Tensor],
    stop: int | None = None,
    record: Collection[int] = (),
    convention: str = "unit",
    keep: Collection[int] | None = None,
    graphs: Graphs = NO_GRAPHS,
) -> Rollout:
    """Runs the first `stop` steps (default: all) from noise `x` (B, ...).

    `noise(k)` gives step k's z, (B, ...); it is not called for a deterministic step (η = 0, or
    the last of the grid). The log-probabilities of the steps in `record` are kept, and of the
    states those in `keep` (default: all) and the last. The steps of `graphs` run with gradient,
    each from its state alone, and are appended there, for `pinned` and `go_back`.

    Raises:
        ValueError: if `record` has a deterministic step under the "gaussian" `convention`.
    """
    sigmas = to_device(sigmas, x.device)
    last = (len(sigmas) - 1 if stop is None else stop) - 1
    states, recorded = {0: x}, {}
    for k in range(last + 1):
        given = x.detach().requires_grad_() if k in graphs.through else x
        with torch.set_grad_enabled(k in graphs.kept):
            mean, std = step(velocity, given, sigmas, k, cond, eta)
        if k in graphs.kept:
            graphs.kept[k].append(Kept(given, mean, std))
            mean = mean.detach()
        random = stochastic(sigmas, k, eta)
        if k in record and convention == "gaussian" and not random:
            raise ValueError("a deterministic step has no Gaussian density")
        x = _drawn(mean, std, noise(k) if random else None)
        states[k + 1] = x
        if k in record:
            recorded[k] = log_prob(x, mean, std, convention)
        if keep is not None and k not in keep:
            del states[k]
    return Rollout(sigmas, states, cond, eta, recorded)


def join(parts: Sequence[Rollout], cond: Conditioning | Grouped) -> Rollout:
    """Rollouts of several micro-batches as one, along the batch, whose conditioning is `cond`."""
    states = {k: torch.cat([p.states[k] for p in parts]) for k in parts[0].states}
    recorded = {k: torch.cat([p.log_probs[k] for p in parts]) for k in parts[0].log_probs}
    return Rollout(parts[0].sigmas, states, cond, parts[0].eta, recorded)


def attach(velocity: Velocity, trajectory: Rollout, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step k again, with gradient: (x_{k+1}, mean, std).

    The returned x_{k+1} has the recorded value and the gradient of the step's mean, the noise
    held fixed.
    """
    return _attach(velocity, trajectory, k, trajectory.states[k])


def advance(velocity: Velocity, trajectory: Rollout, k: int, noise: Tensor | None) -> Tensor:
    """Step k for the first time and with gradient: x_{k+1}, from the recorded state of step k.

    `noise` is the step's z (B, ...), held fixed; None for a deterministic step.
    """
    x = trajectory.states[k]
    mean, std = step(velocity, x, trajectory.sigmas, k, trajectory.conditioning, trajectory.eta)
    return _drawn(mean, std, noise)


def attach_from(
    velocity: Velocity, trajectory: Rollout, first: int, most: float | Tensor | None = None
) -> Tensor:
    """Steps `first` to the last again, as one graph: x_K with its recorded value (METHOD §5).

    Its gradient is the pathwise one of all these steps, every noise held fixed: the CPS step is
    reparametrised, so that it goes through stochastic steps as through the deterministic last.
    `most` (0-d if a tensor) is the greatest norm that a sample's gradient may have at the states
    between them; a greater one, as a sample has where a small change of the state makes another
    image, is scaled.
    """
    x = trajectory.states[first]
    for k in range(first, trajectory.steps):
        if most is not None and x.requires_grad:
            x.register_hook(partial(_at_most, most))
        x = _attach(velocity, trajectory, k, x)[0]
    return x


def go_back(
    steps: Sequence[Kept],
    gradient: Tensor,
    most: float | Tensor | None,
    again: Sequence[bool],
) -> None:
    """The gradient (B, ...) at the end of successive steps back through their graphs, as that of
    `attach_from`; `again` has for each whether its graph will be gone through once more."""
    for one, later in zip(reversed(steps), reversed(again), strict=True):
        one.mean.backward(gradient, retain_graph=later)
        if one.x.grad is not None:
            gradient = one.x.grad if most is None else _at_most(most, one.x.grad)
            one.x.grad = None


def _at_most(most: float | Tensor, gradient: Tensor) -> Tensor:
    """Each sample's gradient (B, ...) at a norm of at most `most`."""
    norm = broadcast(gradient.flatten(1).norm(dim=1), gradient)
    return gradient * (most / norm.clamp(min=most))


def _attach(
    velocity: Velocity, trajectory: Rollout, k: int, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Step k from `x`, which has the value of the recorded state: (x_{k+1}, mean, std)."""
    mean, std = step(velocity, x, trajectory.sigmas, k, trajectory.conditioning, trajectory.eta)
    return pinned(trajectory, k, mean), mean, std


def pinned(trajectory: Rollout, k: int, mean: Tensor) -> Tensor:
    """The recorded x_{k+1} with the gradient of step k's `mean`, the noise held fixed."""
    return mean + (trajectory.states[k + 1] - mean).detach()


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, convention: str = "unit") -> Tensor:
    """A stochastic step's log-probability, averaged over the elements of a sample: (B,).

    "unit" is −mean‖x' − mean‖² (the reference's convention); "gaussian" the log density of
    N(mean, std²) an element, not finite for std 0 (METHOD §5). `x_next` carries no gradient.

    Raises:
        ValueError: on an unknown convention.
    """
    error = (x_next.detach() - mean) ** 2
    if convention == "unit":
        return -error.flatten(1).mean(1)
    if convention != "gaussian":
        raise ValueError(f"log_prob convention {convention!r} is none of {', '.join(LOG_PROBS)}")
    variance = broadcast(std.flatten(), mean) ** 2
    return -0.5 * (error / variance + torch.log(2 * torch.pi * variance)).flatten(1).mean(1)
