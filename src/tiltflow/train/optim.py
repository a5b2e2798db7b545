"""Optimizer steps, and the guard that stops a run on a non-finite number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tiltflow.checkpoint import load_optimizer_tensors, optimizer_tensors
from tiltflow.prompts import Prompt
from tiltflow.roles import Role


class NonFiniteError(RuntimeError):
    """A loss, gradient or reward became NaN or infinite."""


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
    ) -> None:
        self.role, self.lr, self.clip, self.schedule = role, lr, clip, schedule
        self.names = list(role.parameters)
        self.parameters = list(role.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=betas, weight_decay=weight_decay
        )

    def apply(self, step: int) -> Tensor:
        """Clips, steps, clears; the gradient's norm before clipping (0-d).

        Raises:
            NonFiniteError: if the gradient is not finite; the weights are then untouched.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"step {step}: the gradient of the {self.role.name} is not finite; "
                "lower its learning rate, or look at the losses before this step"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.names)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, self.names, tensors)


def require_finite(step: int, term: str, values: Tensor, prompts: Sequence[Prompt]) -> None:
    """Stops the run if a per-sample value (B,) of `term` is not finite.

    Raises:
        NonFiniteError: naming the step, the term and the first offending prompt.
    """
    finite = torch.isfinite(values.detach())
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        value = float(values[row].detach())
        raise NonFiniteError(f"step {step}: {term} is {value} for the prompt {prompts[row].text!r}")
