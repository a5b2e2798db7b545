"""Rewards held against what they will be asked for, before anything is loaded: their code, the
packages they need, and the prompts they are to score."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from tiltflow.rewards.base import BUILTIN, ELSEWHERE, Metadata, target_of
from tiltflow.rewards.fitted import fitted_clip, fitted_folder, is_fitted
from tiltflow.rewards.packaged import check_words, default_clip
from tiltflow.rewards.packages import require_packages
from tiltflow.rewards.remote.address import JUDGE
from tiltflow.rewards.remote.asking import require_guide

SHOWN = 3
"""Prompts that an error names besides the first."""

Reads = Callable[[str, Metadata], object]
"""Reads a prompt's text and metadata as a reward does; raises ValueError where it cannot."""


class PromptLike(Protocol):
    """A prompt's text and what else is known about it."""

    @property
    def text(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, object]: ...


def check_reward_imports(names: Iterable[str], with_path: Collection[str] = ()) -> None:
    """Passes rewards whose code and packages are there; no weight is loaded, no server asked.
    Judges run here if they are among those `with_path`.

    Raises:
        ValueError: naming the first reward of which there is none, or that cannot be imported.
    """
    for name in names:
        require_packages(name)
        if name.startswith(JUDGE) and name in with_path:
            require_guide(name)
        elif name not in BUILTIN and not name.startswith(ELSEWHERE) and not is_fitted(name):
            target_of(name)


def check_prompts_fit(
    rewards: Iterable[str] | Mapping[str, str | None], prompts: Sequence[PromptLike]
) -> None:
    """Passes prompts that all of these rewards can score: names, or names with the path of their
    weights. Every prompt is read by every reward that needs more of it than a text, or that a
    packaged CLIP reads.

    A function or class of one's own says what it needs by an attribute `reads`, a function
    `(text, metadata)` that raises a ValueError. What a reward server needs is not known here.

    Raises:
        ValueError: naming the first prompt by number and text, and the next by their numbers.
    """
    paths = rewards if isinstance(rewards, Mapping) else dict.fromkeys(rewards)
    for name, path in paths.items():
        reads = _reads(name, path)
        if reads is None:
            continue
        bad = [number for number, prompt in enumerate(prompts, 1) if _problem(reads, prompt)]
        if bad:
            first = f"prompt {bad[0]}: {_problem(reads, prompts[bad[0] - 1])}"
            raise ValueError(f"reward {name!r} cannot score {first}{_others(bad)}")


def may_read_metadata(name: str) -> bool:
    """Whether a reward's scores may depend on the metadata of a prompt beside its text: of those
    that are known to read the text alone, or what agrees with it (`shapes`), they do not."""
    if name in BUILTIN:
        return name in OF_METADATA
    return not (name.startswith(JUDGE) or is_fitted(name))


def _problem(reads: Reads, prompt: PromptLike) -> ValueError | None:
    try:
        reads(prompt.text, prompt.metadata)
    except ValueError as error:
        return error
    return None


def _others(bad: Sequence[int]) -> str:
    if len(bad) == 1:
        return ""
    shown = ", ".join(map(str, bad[1 : 1 + SHOWN]))
    more = ", …" if len(bad) > 1 + SHOWN else ""
    return f" (nor {len(bad) - 1} other{'s' if len(bad) > 2 else ''}: {shown}{more})"


def _reads(name: str, path: str | None) -> Reads | None:
    """How a reward reads a prompt; None where any text will do, or nobody here knows."""
    if is_fitted(name):
        path = fitted_clip(fitted_folder(name))
        return None if path is None else partial(_clip, path)
    if name in CLIPS:
        return partial(_clip, path or default_clip(name))
    if name == "geneval" and path is None:  # which classes another detector knows, it says later
        return _geneval_of_coco
    if name in BUILTIN:
        return READS.get(name)
    if name.startswith(ELSEWHERE):
        return None
    reads: Reads | None = getattr(target_of(name), "reads", None)
    return reads


def _clip(clip: str, text: str, metadata: Metadata) -> None:
    check_words(text, clip)


def _ocr(text: str, metadata: Metadata) -> object:
    from tiltflow.rewards.zoo.ocr import quoted_text

    return quoted_text(text)


def _geneval(text: str, metadata: Metadata) -> object:
    from tiltflow.rewards.zoo.geneval_rules import scene_of

    return scene_of(metadata, text)


def _geneval_of_coco(text: str, metadata: Metadata) -> None:
    from tiltflow.rewards.zoo.geneval_rules import CLASSES, check_classes, scene_of

    check_classes(scene_of(metadata, text), CLASSES, text)


def _geneval2(text: str, metadata: Metadata) -> object:
    from tiltflow.rewards.zoo.geneval2 import questions_of

    return questions_of(metadata, text)


def _hpsv3(text: str, metadata: Metadata) -> object:
    from tiltflow.rewards.zoo.hpsv3 import without_token

    return without_token(text)


def _shapes(text: str, metadata: Metadata) -> object:
    from tiltflow.rewards.zoo.shapes import caption_of

    return caption_of(text, metadata)


# Imported when asked for: some of these modules take seconds.
READS: dict[str, Reads] = {
    "geneval": _geneval,
    "geneval2": _geneval2,
    "hpsv3": _hpsv3,
    "ocr": _ocr,
    "shapes": _shapes,
    "shapes_soft": _shapes,
}
"""How the builtin rewards that need more of a prompt than a text read it."""
CLIPS = ("clipscore", "clipscore_heldout")
"""The builtin rewards that any CLIP at their path computes."""
OF_METADATA = ("geneval", "geneval2")
"""The builtin rewards that score by what is not in the text."""
