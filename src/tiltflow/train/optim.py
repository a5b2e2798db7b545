"""Optimizer steps over all ranks, and the guard against non-finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tiltflow.checkpoint import load_optimizer_tensors, optimizer_tensors
from tiltflow.distributed import ALONE, Ranks
from tiltflow.prompts import Prompt
from tiltflow.rewards.base import NonFiniteScore
from tiltflow.roles import Role


class NonFiniteError(RuntimeError):
    """A loss, gradient or reward became NaN or infinite."""


NON_FINITE = (NonFiniteError, NonFiniteScore)
"""What an iteration raises, on every rank alike, when a number is not finite."""


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """Linear over `warmup` iterations, then a half cosine from 1 to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def constant(step: int, steps: int, warmup: int = 0) -> float:
    """Linear over `warmup` iterations, then 1."""
    return min((step + 1) / warmup, 1.0) if warmup else 1.0


class Updater:
    """AdamW over one role's parameters, with the gradient's norm clipped.

    Each rank brings the gradient of its rows; `apply` adds them up in one all-reduce, and with
    them whether any rank saw a non-finite loss, so that all ranks stop or skip at the same step.

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
    ) -> None:
        self.role, self.lr, self.clip, self.schedule = role, lr, clip, schedule
        self.names = list(role.parameters)
        self.parameters = list(role.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=betas, weight_decay=weight_decay
        )
        self.ranks = ranks
        self._watched: list[tuple[str, Tensor, Sequence[Prompt]]] = []
        self._refused: NonFiniteScore | None = None

    def watch(self, term: str, values: Tensor, prompts: Sequence[Prompt]) -> None:
        """Has the next `apply` refuse per-sample values (B,) of `term` that are not finite."""
        self._watched.append((term, values.detach(), prompts))

    def refuse(self, error: NonFiniteScore) -> None:
        """Has the next `apply` raise `error`, after it has told the other ranks."""
        self._refused = error

    def apply(self, step: int) -> Tensor:
        """Adds up over ranks, clips, steps, clears; the gradient's norm before clipping (0-d).

        Raises:
            NonFiniteError: on every rank, if the gradient or a watched value of any rank is not
                finite; the weights are then untouched and the gradients cleared.
            NonFiniteScore: instead, on the rank that was told to `refuse`.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bad = self._bad()
        self.ranks.sum_([*gradients, bad])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        watched, refused = self._watched, self._refused
        self._watched, self._refused = [], None
        if not torch.isfinite(norm) & (bad == 0):
            self.optimizer.zero_grad(set_to_none=True)
            if refused is not None:
                raise refused
            raise NonFiniteError(f"step {step}: {self._reason(watched, bool(bad))}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _bad(self) -> Tensor:
        """How many watched values or refusals there are (0-d), without waiting for the device."""
        bad = torch.zeros((), device=self.parameters[0].device)
        for _, values, _ in self._watched:
            bad += (~torch.isfinite(values)).sum()
        return bad + float(self._refused is not None)

    def _reason(self, watched: Sequence[tuple[str, Tensor, Sequence[Prompt]]], bad: bool) -> str:
        """The first non-finite value with its term and prompt, or else what is known."""
        for term, values, prompts in watched:
            finite = torch.isfinite(values)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                return f"{term} is {float(values[row])} for the prompt {prompts[row].text!r}"
        if bad:
            return f"a value of the {self.role.name}'s loss on another rank is not finite"
        return (
            f"the gradient of the {self.role.name} is not finite; "
            "lower its learning rate, or look at the losses before this step"
        )

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.names)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, self.names, tensors)
