"""A reward of one's own: warm colours, more red than blue.

A few iterations of both stages on the embedded model, far too few to learn much; then the same
prompts with stage 2 off and on.

    python own_reward.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

import tiltflow


def warmth(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
) -> Tensor:
    """Mean of red minus mean of blue, (B,), of images (B, 3, H, W) in [0, 1]."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


warmth.differentiable = True  # gradients flow from the score to the image


def main(folder: Path, iterations: int = 2) -> None:
    tiltflow.register("reward", "warmth", warmth)
    short = {"steps": iterations, "batch_size": 4}
    quick = {"watch": {"rewards": {}}, "log": {"samples_every": 0, "every": 1}}
    cold = tiltflow.train(
        tiltflow.load_recipe("demo_cold_start", train=short, run={"out": folder / "cold"}, **quick)
    )
    tilt = tiltflow.train(
        tiltflow.load_recipe(
            "demo_tilt",
            model={"few_step": cold.path},
            train=short,
            tilt={"group_size": 2},
            rewards={"warmth": 1.0},
            run={"out": folder / "tilt"},
            **quick,
        )
    )
    for row in tilt.metrics:
        print(f"step {row['step']}: warmth {row['reward/warmth']:+.3f}")
    assert tilt.export is not None
    lora = {"few_step": tilt.export / "few_step", "tilt_lora": tilt.export / "tilt"}
    prompts = ["a red circle", "a blue square"]
    for strength in (0.0, 1.0):
        images = tiltflow.sample("packaged:pipeline", prompts, tilt=strength, **lora)
        red, blue = images[..., 0].mean() / 255, images[..., 2].mean() / 255
        print(f"tilt {strength:.0f}: warmth {red - blue:+.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_reward"))
