"""An objective of stage 1 of one's own: the bare score difference. Here: python own_objective.py

It takes some minutes and says how it went at the end; with train.steps=50 after it, a look.

In a recipe: `cold_start.objective=own_objective:Difference`.
"""

import sys
from pathlib import Path

from torch import Tensor

import tiltflow
from tiltflow.flow import broadcast, renoise, renoise_level
from tiltflow.method.boundary import Boundary
from tiltflow.training.parts import Parts


class Difference:
    """scale · t (v_ψ − v_φ) at a re-noised x_s: how far fake score and teacher disagree about the
    clean sample, without the division that DMD has.

    Random numbers are counted draws for the global batch, of which this rank has its rows.
    """

    def __init__(self, parts: Parts, scale: float = 1.0) -> None:
        self.parts, self.scale = parts, float(scale)

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        random, share, roles = self.parts.randomness, self.parts.share, self.parts.roles
        u = share.of(random.uniform(f"{stream}/t", draw, (share.batch,)), at.x.device)
        t = renoise_level(at.s, u)
        shape, device = at.x.shape[1:], at.x.device
        noise = share.noise(random, f"{stream}/noise", draw, shape, device)
        x_t = renoise(at.x.detach(), at.s, t, noise)
        cond = at.cond[slice(None)]
        teacher = roles.teacher.field(cond, self.parts.matching.guidance)
        fake = roles.fake_score.at(at.k).field(cond)
        difference = fake(x_t, t) - teacher(x_t, t)
        return -self.scale * broadcast(t, difference) * difference


def main(out: Path, *settings: str) -> None:
    chosen = [f"run.out={out}", "cold_start.objective=own_objective:Difference", *settings]
    run = tiltflow.train(tiltflow.load_recipe("mixture_cold_start", *chosen))
    print(f"{run.path} is at step {run.step}")


if __name__ == "__main__":
    main(Path("runs/own_objective"), *sys.argv[1:])
