"""A medium of one's own, short waves, and both stages on them. Here: python own_medium.py

A point (a, b) of the mixture is the wave a·cos t + b·sin t; the reward is how high it begins.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.models.medium import PointMedium, ends, not_finite, require
from tiltflow.tasks.train import run_training

LENGTH, SIDE = 32, 64


class Waves(PointMedium):
    name, one, at_once = "waves", "wave", 1

    def check(self, samples):
        require(samples.shape[1:] == (LENGTH,), samples, f"(B, {LENGTH}) float waves")
        return not_finite(self.one, *ends(samples))

    def decode(self, decoded):
        t = torch.arange(LENGTH, device=decoded.device) * (2 * torch.pi / LENGTH)
        return decoded[:, :1] * t.cos() + decoded[:, 1:] * t.sin()

    def features(self, samples):
        return torch.fft.rfft(samples).abs()

    def sheet(self, samples, columns):
        """Each wave as a line, one below the other."""
        picture = np.full((len(samples), SIDE, LENGTH, 3), 255, np.uint8)
        heights = (1 - samples.cpu().numpy() / 8) * SIDE / 2
        for drawn, row in zip(picture, heights.astype(int).clip(0, SIDE - 1), strict=True):
            drawn[row, np.arange(LENGTH)] = 0
        return picture.reshape(-1, LENGTH, 3)


def onset(waves, prompts, metadata):
    return waves[:, 0]


onset.domain, onset.differentiable = "own_medium:Waves", True


def main(out: Path, *settings: str) -> Path:
    common = ["model.medium=own_medium:Waves", *settings]
    tilt = [f"model.few_step={out}/cold_start", "rewards={own_medium:onset: 1.0}"]
    for stage, own in (("cold_start", []), ("tilt", tilt)):
        chosen = [*common, *own, f"run.out={out}/{stage}"]
        run_training(load_config(f"mixture_{stage}", chosen), Console())
    return out / "tilt"


if __name__ == "__main__":
    main(Path("runs/waves"), *sys.argv[1:])
