"""The pictures of README.md, from the demo's runs and from examples/two_stages.py.

    make demo
    python scripts/first_page.py                          both pictures
    python scripts/first_page.py --only images --few-step RUN --tilt RUN

The strip has the first held-out prompt of each category, so that nobody chose them, and one noise
for a row.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.evaluation.categories import category_of
from tiltflow.tasks.request import Request, prepare

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
STRENGTHS = (0.0, 0.5, 1.0)


def chosen(prompts: list[Prompt]) -> list[Prompt]:
    """The first prompt of each category."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(str(category_of(prompt.metadata)), prompt)
    return list(first.values())


def columns(few_step: Path, tilt: Path, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Images (prompts, 3, H, W) in [0, 1] by the title of their column."""
    made: dict[str, Tensor] = {}
    rows = range(len(prompts))
    for strength in STRENGTHS:
        request = Request(
            model="packaged:pipeline",
            prompts=prompts,
            few_step=few_step / "export" / "few_step",
            tilt_lora=tilt / "export" / "tilt",
            tilt=strength,
            dtype="fp32",
            cache="off",
        )
        loaded, sampler = prepare(request)
        systems = {each.name: each for each in sampler.systems(loaded, teacher=not made)}
        if not made:
            made["teacher\n50 steps, 100 passes"] = systems["teacher"].sample(rows)
            made["teacher\n4 steps, 8 passes"] = systems["teacher_4_step"].sample(rows)
        made[f"student, 4 passes\ntilt {strength:g}"] = systems["rtdmd"].sample(rows)
    return made


def strip(few_step: Path, tilt: Path, out: Path) -> None:
    prompts = chosen(load_prompts("shapes-heldout"))
    made = columns(few_step, tilt, prompts)
    size = (1.5 * len(made) + 2.2, 1.5 * len(prompts) + 0.5)
    figure, axes = plt.subplots(len(prompts), len(made), figsize=size, layout="constrained")
    for column, (title, images) in enumerate(made.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images):
            axes[row, column].imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
    for row, prompt in enumerate(prompts):
        text = "\n".join(wrapped(prompt.text, 22))
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(out, dpi=110)


def wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        lines = (
            [*lines, word]
            if len(lines[-1] + word) > width
            else [*lines[:-1], f"{lines[-1]} {word}"]
        )
    return [line.strip() for line in lines]


def mixture(out: Path) -> None:
    """Samples of the example before, between and after its stages, over the teacher's modes."""
    page = runpy.run_path(str(ROOT / "examples" / "two_stages.py"))
    seen, modes = page["main"](), page["world"].mixture.means
    titles = ("before training", "after stage 1: matched", "after stage 2: tilted to the right")
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 3.7), sharex=True, sharey=True, layout="constrained"
    )
    for axis, title, (share, beta, x) in zip(axes, titles, seen.values(), strict=True):
        axis.scatter(*x[:2000].T, s=1.5, color="#1f5fa8", alpha=0.5)
        axis.scatter(*modes.T, s=18, color="#c0392b", marker="x")
        axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", title=title)
        axis.set_xlabel(f"near a mode {share:.2f}, β = {beta:+.2f}")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--few-step", type=Path, default=Path("runs/demo/cold_start"))
    parser.add_argument("--tilt", type=Path, default=Path("runs/demo/tilt"))
    parser.add_argument("--only", choices=("images", "mixture"))
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.only != "mixture":
        strip(args.few_step, args.tilt, args.out / "first_page.png")
    if args.only != "images":
        mixture(args.out / "two_stages.png")


if __name__ == "__main__":
    main()
