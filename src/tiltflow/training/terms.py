"""The terms of stage 2's loss (METHOD §5): where each needs a graph, and what it adds there.

An epoch asks every term for its `spans`, makes the rollout, and then has each span of sampler steps
run once with gradient, whichever terms look at it. A term of one's own derives from `Term`,
and is named under `tilt.terms` in a recipe (examples/own_term.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.data.prompts import Prompt
from tiltflow.method.boundary import Boundary
from tiltflow.method.distribution_matching import matching_loss
from tiltflow.method.policy import choose_steps, clipped_surrogate, policy_kl, window_steps
from tiltflow.method.reward_backprop import in_equal_parts
from tiltflow.method.rollout import Rollout, log_prob
from tiltflow.method.rollout import step as sampler_step
from tiltflow.models.roles import Roles
from tiltflow.training.objective import Objective
from tiltflow.training.optim import Updater
from tiltflow.training.scoring import Scored
from tiltflow.training.settings import TiltConfig


@dataclass(frozen=True, order=True)
class Span:
    """Sampler steps `first` … `stop` − 1, run again as one graph; none where `first` is `stop`: the
    state as it is, for a term that calls the networks itself.

    `bound`: each sample's gradient at the states between the steps is held to this weight's share
    of the loss, at the norm of `in_equal_parts`.
    """

    first: int
    stop: int
    bound: float | None = None

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def steps(self) -> range:
        return range(self.first, self.stop)

    @property
    def place(self) -> tuple[int, int, float]:
        """By which spans are put in order; no two of an epoch have the same, so that the order of a
        sum does not depend on that of a set, which is another in every process."""
        return len(self), self.first, -1.0 if self.bound is None else self.bound

    @property
    def states(self) -> range:
        return range(self.first, self.stop + 1)


@dataclass(frozen=True)
class Attached:
    """A span of some rows with its graph: its end `x` (b, ...); `mean` and `std` of a single step.

    `part` is the rows' trajectory without graph.
    """

    span: Span
    rows: slice
    part: Rollout
    x: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Epoch:
    """One rollout and its rewards: what the terms look at. Rows are this rank's.

    `advantages` (b,) are over the groups of the global batch.
    """

    step: int
    trajectory: Rollout
    prompts: Sequence[Prompt]
    scored: Scored
    advantages: Tensor


Loss = Callable[[Attached], tuple[Tensor, dict[str, Tensor]]]
"""The weighted loss (b,) at a span, and figures (b,) for the log."""


class Term(ABC):
    """One term of the generator's loss; one of one's own derives from it."""

    name: str
    """What an error about a value that is not finite calls it."""
    takes_gradient: bool = False
    """Whether it looks at the rewards' own gradient, `epoch.scored.gradient`."""

    @classmethod
    def passes(cls, steps: int, **settings: object) -> int:
        """The generator's passes whose graphs a span holds at once, at `steps` sampler steps and
        with the constructor's `settings`: what a plan of memory counts. The steps of its longest
        span, and the passes that the loss makes itself."""
        return 1

    @property
    def updaters(self) -> Mapping[str, Updater]:
        """What it trains itself, in `begin`: saved and resumed with the run, each by the name of
        its role, which no other has."""
        return {}

    def explores(self, step: int) -> tuple[int, ...]:
        """Steps, of 0 … K − 2, at which members of a group have noise of their own in epoch `step`,
        and whose log-probabilities the rollout keeps; at others a group shares its noise."""
        return ()

    @abstractmethod
    def spans(self, step: int) -> tuple[Span, ...]:
        """Where epoch `step` needs a graph; none for a term of weight 0."""

    @abstractmethod
    def begin(self, epoch: Epoch) -> Loss:
        """What does not need the generator's graph, done once an epoch."""


def single(k: int) -> Span:
    """Step k alone."""
    return Span(k, k + 1)


@dataclass(frozen=True, eq=False)
class Policy(Term):
    """SubGRPO: the policy gradient of M of the stochastic steps below `stop`.

    Steps that the reward is back-propagated through are not among them: one step has one gradient
    of the reward.
    """

    settings: TiltConfig
    roles: Roles
    randomness: Randomness
    stop: int
    name = "the policy loss"

    def explores(self, step: int) -> tuple[int, ...]:
        """The trained steps."""
        if self.settings.policy_weight == 0:
            return ()
        chosen = self.settings
        if chosen.subset_order == "window":
            return window_steps(step, self.stop, chosen.subset, chosen.window_every)
        order = self.randomness.permutation("subset", step, self.stop)
        return choose_steps(order, chosen.subset)

    def parts(self, step: int) -> int:
        """What every term is divided by, besides the batch."""
        return len(self.explores(step)) + 1 if self.settings.policy_reduction == "sum" else 1

    def spans(self, step: int) -> tuple[Span, ...]:
        return tuple(single(k) for k in self.explores(step))

    def begin(self, epoch: Epoch) -> Loss:
        chosen = self.settings
        over = 1 if chosen.policy_reduction == "sum" else len(self.explores(epoch.step))

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            k, part = at.span.first, at.part
            now = log_prob(part.states[k + 1], at.mean, at.std, chosen.log_prob)
            old = part.log_probs[k]
            losses = clipped_surrogate(now, old, epoch.advantages[at.rows], chosen.clip_range)
            seen = {"policy/ratio_gap": (torch.exp(now.detach() - old) - 1).abs()}
            if chosen.kl > 0:
                kl = policy_kl(
                    at.mean, self._reference(part, k), at.std, chosen.kl_form or chosen.log_prob
                )
                losses = losses + chosen.kl * kl
                seen["policy/kl"] = kl.detach()
            return chosen.policy_weight * losses / over, seen

        return loss

    def _reference(self, part: Rollout, k: int) -> Tensor:
        """The mean of step k by the stage-1 policy."""
        reference = self.roles.reference
        assert reference is not None
        with torch.no_grad():
            mean, _ = sampler_step(
                reference, part.states[k], part.sigmas, k, part.conditioning, part.eta
            )
        return mean


@dataclass(frozen=True, eq=False)
class Match(Term):
    """AC-DMD at the last boundary as published, at a random one, or at all of them."""

    settings: TiltConfig
    objective: Objective
    randomness: Randomness
    steps: int
    name = "the matching loss"

    def spans(self, step: int) -> tuple[Span, ...]:
        if self.settings.matching_weight == 0:
            return ()
        if self.settings.match_steps == "all":
            return tuple(single(k) for k in range(self.steps))
        if self.settings.match_steps == "random":
            at = self.randomness.integers("match/boundary", step, 0, self.steps, (1,))
            return (single(int(at)),)
        return (single(self.steps - 1),)

    def begin(self, epoch: Epoch) -> Loss:
        gradients = {}
        for span in self.spans(epoch.step):
            at = Boundary.of(epoch.trajectory, span.stop, epoch.prompts)
            stream = f"matching{span.first}"
            gradients[span] = self.objective.gradient(stream, epoch.step, at)

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            losses = matching_loss(at.x, gradients[at.span][at.rows])
            return self.settings.matching_weight * losses, {"generator/matching": losses.detach()}

        return loss


@dataclass(frozen=True, eq=False)
class Pull(Term):
    """The rewards' own gradient, back through `span`: the deterministic last step as published."""

    settings: TiltConfig
    span: Span | None
    name = "the reward's gradient"

    @property
    def takes_gradient(self) -> bool:  # type: ignore[override]
        return self.span is not None

    def spans(self, step: int) -> tuple[Span, ...]:
        return () if self.span is None else (self.span,)

    def begin(self, epoch: Epoch) -> Loss:
        found, losses = epoch.scored.gradient, epoch.scored.losses
        assert found is not None and losses is not None
        norms = found.flatten(1).norm(dim=1)
        gradient = in_equal_parts(found) if self.settings.reward_normalise else found

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            rows = at.rows
            pull = self.settings.reward_weight * (at.x * gradient[rows]).flatten(1).sum(1)
            seen = {
                "generator/reward_loss": losses[rows],
                "generator/reward_gradient": norms[rows],
                "generator/at_target": (losses[rows] == 0).float(),  # the share without a gradient
            }
            return pull, seen

        return loss
