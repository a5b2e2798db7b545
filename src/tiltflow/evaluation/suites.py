"""Suites: a prompt format bound to the rewards that score it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiltflow.core.paths import nearest
from tiltflow.evaluation.scores import PromptLike
from tiltflow.rewards.fitting import check_prompts_fit
from tiltflow.rewards.packaged import VIT_L_14

PREFERENCE = {
    "clipscore": VIT_L_14,
    **dict.fromkeys(("pickscore", "hpsv2", "aesthetic", "image_reward")),
}
"""What general prompts are scored by: agreement with the text, and models of human preference."""


@dataclass(frozen=True)
class Suite:
    """`prompts` is a packaged set, or None where the user brings the file; `rewards` are names,
    each with the path of its weights, or None for its own.

    `needs` are keys that the metadata of every prompt must have.
    """

    prompts: str | None
    rewards: Mapping[str, str | None]
    needs: tuple[str, ...] = ()

    def check(self, prompts: Sequence[PromptLike]) -> None:
        """Passes prompts that the suite's rewards can score.

        Raises:
            ValueError: naming the first that they cannot, and what it lacks.
        """
        for number, prompt in enumerate(prompts, start=1):
            lacking = [key for key in self.needs if key not in prompt.metadata]
            if lacking:
                raise ValueError(
                    f"prompt {number} ({prompt.text!r}) has no {lacking[0]!r}, which this suite "
                    f"scores by: give its metadata file (.jsonl with {', '.join(self.needs)})"
                )
        check_prompts_fit(self.rewards, prompts)


SUITES = {
    "drawbench": Suite(None, PREFERENCE),
    "pickapic": Suite(None, PREFERENCE),
    "hpsv3": Suite(None, {"hpsv3": None}),
    "geneval": Suite(None, {"geneval": None}, needs=("tag", "include")),
    "geneval2": Suite(None, {"geneval2": None}, needs=("vqa_list",)),
    "ocr": Suite(None, {"ocr": None}),
    "shapes": Suite("shapes-heldout", dict.fromkeys(("shapes", "clipscore", "clipscore_heldout"))),
}


def suite_of(name: str) -> Suite:
    """The suite of this name.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name in SUITES:
        return SUITES[name]
    raise ValueError(f"there is no suite {name!r}{nearest(name, list(SUITES))}")
