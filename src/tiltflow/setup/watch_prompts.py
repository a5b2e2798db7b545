"""Which held-out prompts a run looks at, and whether the watch has enough of them: its tests count
a prompt once, however often it repeats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiltflow.config.load import PromptSets, RunConfig
from tiltflow.config.schema import WatchConfig
from tiltflow.core.disk import parse_json
from tiltflow.core.latest import latest_name
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.watch.settings import FEWEST_SAMPLES

SPREAD = "prompts_spread"
"""What a checkpoint's state calls it that the run looks at prompts from all over the file. Runs of
earlier versions took its first lines."""
GOLDEN = (5**0.5 - 1) / 2


def spread_out(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in an order of which the first of any number lie all over the list: a file may be
    sorted by what it asks for. By the golden ratio, no stride of which meets a period of the file.
    """
    return [prompts[i] for i in sorted(range(len(prompts)), key=lambda i: i * GOLDEN % 1)]


def looked_at(cfg: RunConfig, sets: PromptSets) -> list[Prompt]:
    """The held-out prompts as a run takes the first of them: for its samples, its held-out rewards
    and every series of the watch. A run that goes on keeps the order that it began with."""
    return spread_out(sets.fixed) if spreads(cfg) else list(sets.fixed)


def spreads(cfg: RunConfig) -> bool:
    """Whether a run looks all over the file: a new one does, and one that goes on if it did so."""
    folder = Path(cfg.run.out) / "checkpoints"
    name = cfg.run.resume_from
    begun = (latest_name(folder) if name == "latest" else name) if cfg.run.resume else None
    if begun is None:
        return True
    try:
        state = parse_json((folder / begun / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # what is wrong with it is said where it is loaded
    return isinstance(state, dict) and state.get(SPREAD) is True


def too_few_texts(watch: WatchConfig, texts: Sequence[str]) -> str | None:
    """In one sentence, the first series of the watch whose prompts are too few to test; else None.

    `texts` are the prompts that are `looked_at`, of which each series takes the first. Where all
    are one text, the tests count its images one by one (`evaluation/statistics.py`), so one is not
    too few.
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
