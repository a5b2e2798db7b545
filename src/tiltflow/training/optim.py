"""Optimizer steps over all ranks, and the guard against non-finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiltflow.core.checkpoint import load_optimizer_tensors, optimizer_tensors
from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.core.errors import NonFiniteError
from tiltflow.data.prompts import Prompt
from tiltflow.models.roles import Role
from tiltflow.rewards.base import NonFiniteScore

NON_FINITE = (NonFiniteError, NonFiniteScore)
"""What a non-finite number ends a run with, on every rank alike."""


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """Linear over `warmup` iterations, then a half cosine from 1 to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def constant(step: int, steps: int, warmup: int = 0) -> float:
    """Linear over `warmup` iterations, then 1."""
    return min((step + 1) / warmup, 1.0) if warmup else 1.0


Watched = tuple[str, Tensor, Sequence[Prompt]]
"""A term of a loss, its values (B,) and the prompts that they are of."""


@dataclass(frozen=True)
class Attempt:
    """One optimizer step: what was watched, how many of those values were not finite on any rank,
    and whether it was refused (both 0-d fp32 on the device)."""

    step: int
    role: str
    watched: Sequence[Watched]
    bad: Tensor
    refused: Tensor

    def reason(self, bad: bool) -> str:
        """The first non-finite value with its term and prompt, or else what is known."""
        for term, values, prompts in self.watched:
            finite = torch.isfinite(values)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                return f"{term} is {float(values[row])} for the prompt {prompts[row].text!r}"
        if bad:
            return f"a value of the {self.role}'s loss on another rank is not finite"
        return (
            f"the gradient of the {self.role} is not finite; "
            "lower its learning rate, or look at the losses before this step"
        )


class Guard:
    """Refuses optimizer steps over non-finite numbers, without a word from the device to the host.

    The updaters of a stage share one: after a refused step, the later ones of the same iteration
    are refused too. What was refused stays on the device until `failures` asks for it.
    """

    def __init__(self) -> None:
        self._attempts: list[Attempt] = []

    def refused(self, step: int) -> Tensor | None:
        """1 where iteration `step` has had an optimizer step refused, else 0 (0-d fp32); None
        before its first."""
        last = self._attempts[-1] if self._attempts else None
        return last.refused if last is not None and last.step == step else None

    def add(self, attempt: Attempt) -> None:
        self._attempts.append(attempt)

    def forget(self, step: int) -> None:
        """Keeps what was refused in iteration `step` from `failures`: it has failed already."""
        self._attempts = [attempt for attempt in self._attempts if attempt.step != step]

    def failures(self) -> list[NonFiniteError]:
        """One error for each iteration that was refused since the last call; one transfer."""
        attempts, self._attempts = self._attempts, []
        if not attempts:
            return []
        flags = torch.stack([flag for a in attempts for flag in (a.refused, a.bad)]).tolist()
        errors: dict[int, NonFiniteError] = {}
        for attempt, refused, bad in zip(attempts, flags[::2], flags[1::2], strict=True):
            if refused and attempt.step not in errors:
                reason = attempt.reason(bad > 0)
                errors[attempt.step] = NonFiniteError(f"step {attempt.step}: {reason}")
        return list(errors.values())


class Updater:
    """AdamW over one role's parameters, with the gradient's norm clipped.

    Each rank brings the gradient of its rows; `apply` adds them up in one all-reduce, and with
    them how many watched values any rank found not finite, so that all ranks refuse the same steps.

    `schedule(step)` multiplies `lr`; it is a function of the iteration alone, so that a resumed
    run has the rate of the uninterrupted one.
    """

    def __init__(
        self,
        role: Role,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 1.0,
        schedule: Callable[[int], float] = lambda step: 1.0,
        ranks: Ranks = ALONE,
        guard: Guard | None = None,
    ) -> None:
        self.role, self.lr, self.clip, self.schedule = role, lr, clip, schedule
        self.names = list(role.parameters)
        self.parameters = list(role.parameters.values())
        # The fused form alone can leave everything as it was at a flag that lies on the device.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.ranks = ranks
        self.guard = guard or Guard()
        self._watched: list[Watched] = []

    def watch(self, term: str, values: Tensor, prompts: Sequence[Prompt]) -> None:
        """Has the next `apply` refuse per-sample values (B,) of `term` that are not finite."""
        self._watched.append((term, values.detach(), prompts))

    def apply(self, step: int) -> Tensor:
        """Adds up over ranks, clips, steps, clears; the gradient's norm before clipping (0-d).

        If the gradient or a watched value of any rank is not finite, weights and optimizer state
        stay as they are on every rank, and the guard has it for `failures`. The host learns
        nothing of it here.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bad = self._bad()
        self.ranks.sum_([*gradients, bad])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip).detach()
        refused = (~torch.isfinite(norm) | (bad > 0)).float()
        earlier = self.guard.refused(step)
        if earlier is not None:
            refused = torch.maximum(refused, earlier)
        self.guard.add(Attempt(step, self.role.name, self._watched, bad, refused))
        self._watched = []
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(step)
        self.optimizer.found_inf = refused  # type: ignore[attr-defined]  # as a GradScaler does
        self.optimizer.step()
        # the fused form changes weights without a word to torch's counters of such changes
        torch.autograd.graph.increment_version(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def drop(self) -> None:
        """Forgets gradients and watched values since the last `apply`."""
        self._watched = []
        self.optimizer.zero_grad(set_to_none=True)

    def _bad(self) -> Tensor:
        """How many watched values are not finite (0-d fp32)."""
        bad = torch.zeros((), device=self.parameters[0].device)
        for _, values, _ in self._watched:
            bad += (~torch.isfinite(values)).sum()
        return bad

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.names)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, self.names, tensors)
