"""A run's student of the embedded model, scored on held-out prompts from one noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.evaluation.statistics import Comparison, paired_comparison
from tiltflow.tasks.evaluate import evaluate
from tiltflow.tasks.request import Request


def held_out(count: int) -> list[Prompt]:
    return load_prompts("shapes-heldout")[:count]


def student_scores(
    run: Path, rewards: Sequence[str], count: int, **options: Any
) -> dict[str, list[float]]:
    """Every column's scores of the prompts (of diversity, of those that it is measured on) of a
    stage-2 run; `options` are a `Request`'s."""
    request = Request(
        model="packaged:pipeline",
        prompts=held_out(count),
        few_step=run / "export" / "few_step",
        tilt_lora=run / "export" / "tilt",
        batch=128,
        device="cpu",
        autocast="auto",
        rewards=dict.fromkeys(rewards),
        **options,
    )
    ((_, found),) = evaluate(request, alone=True).scores.items()
    return {name: [float(f"{x:.5g}") for x in values.tolist()] for name, values in found.items()}


def paired(a: Sequence[float], b: Sequence[float], count: int) -> Comparison:
    """Of two of these columns; captions that repeat count once."""
    of = [prompt.text for prompt in held_out(count)] if len(a) == count else None
    return paired_comparison(a, b, of)
