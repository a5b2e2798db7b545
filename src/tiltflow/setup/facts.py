"""What a run says of itself in each of its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tiltflow.core.sizes import Resolution
from tiltflow.models.roles import AdapterSettings


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of its run, so that export and resume need no config."""

    stage: str
    adapters: AdapterSettings | None
    few_step_adapters: AdapterSettings | None
    """What stage 2's tilt stands on; None in stage 1 and of copies, whose checkpoints say so."""
    steps: int | tuple[int, ...]
    eta: float
    student_guidance: float | None
    rewards_at_once: dict[str, int | None] | None
    """None in stage 1, whose checkpoints do not have it."""
    sizes: tuple[Resolution, ...] | None
    """Those of `data.buckets`, the most frequent first; None without, and checkpoints then do not
    have it."""
    fake_score_continued: bool | None = None
    """Whether stage 2 trains stage 1's adapter of the fake score, of stage 1's rank and α; None in
    stage 1 and of copies, whose checkpoints do not have it."""
    prompts_spread: bool = False
    """Whether samples and the watch take prompts from all over the file (`watch_prompts.spreads`);
    the checkpoints of other runs do not have it."""

    def as_json(self) -> dict[str, object]:
        """The facts as a checkpoint's state has them."""
        values = asdict(self)
        for name in ("rewards_at_once", "sizes", "fake_score_continued"):
            if values[name] is None:
                del values[name]
        if not self.prompts_spread:
            del values["prompts_spread"]
        return values
