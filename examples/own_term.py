"""A term of stage 2 of one's own: it holds the generator near stage 1's. Here: python own_term.py

It takes some minutes and says how it went at the end; with train.steps=50 after it, a look.

In a recipe: `tilt.terms={own_term:Stay: {weight: 0.5}}`.
"""

import sys
from pathlib import Path

import torch

import tiltflow
from tiltflow.core.settings import Section, Weight
from tiltflow.method.rollout import step
from tiltflow.training.parts import Parts
from tiltflow.training.terms import Attached, Epoch, Loss, Span, Term, single


class Stay(Term):
    """weight · mean‖mean of a step − mean of the same step by stage 1‖², at every step."""

    name = "the distance to stage 1"

    class Settings(Section):
        weight: Weight

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts, self.weight = parts, settings.weight

    def spans(self, step: int) -> tuple[Span, ...]:
        return tuple(single(k) for k in range(self.parts.steps)) if self.weight else ()

    def begin(self, epoch: Epoch) -> Loss:
        reference = self.parts.roles.reference
        assert reference is not None

        def loss(at: Attached) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            part, k = at.part, at.span.first
            with torch.no_grad():
                there, _ = step(
                    reference, part.states[k], part.sigmas, k, part.conditioning, part.eta
                )
            gap = (at.mean - there).square().flatten(1).mean(1)
            return self.weight * gap, {"generator/stay": gap.detach()}

        return loss


def main(out: Path, *settings: str) -> None:
    cold = tiltflow.load_recipe("mixture_cold_start", f"run.out={out}/cold", *settings)
    tilt = [f"run.out={out}/tilt", f"model.few_step={tiltflow.train(cold).path}"]
    tilt += ["tilt.terms={own_term:Stay: {weight: 0.5}}", *settings]
    run = tiltflow.train(tiltflow.load_recipe("mixture_tilt", *tilt))
    print(f"{run.path}: the distance to stage 1 is {run.metrics[-1]['generator/stay']:.5f}")


if __name__ == "__main__":
    main(Path("runs/own_term"), *sys.argv[1:])
