"""Whether the watch has prompts enough: its tests count a prompt once, however often it repeats."""

from __future__ import annotations

from collections.abc import Sequence

from tiltflow.config.schema import WatchConfig
from tiltflow.evaluation.watch.settings import FEWEST_SAMPLES


def too_few_texts(watch: WatchConfig, texts: Sequence[str]) -> str | None:
    """In one sentence, the first series of the watch whose prompts are too few to test; else None.

    `texts` are the held-out prompts, of which each series takes the first. Where all are one text,
    the tests count its images one by one (`evaluation/statistics.py`), so one is not too few.
    """
    for key in ("prompts", "diversity_prompts", "teacher_images"):
        count = min(getattr(watch, key), watch.prompts)
        different = len(set(texts[:count]))
        if 1 < different < FEWEST_SAMPLES:
            return (
                f"the {count} images of watch.{key} are of {different} different prompts, but no "
                f"test can tell a change from chance with fewer than {FEWEST_SAMPLES}: "
                "data.eval_prompts needs more"
            )
    return None
