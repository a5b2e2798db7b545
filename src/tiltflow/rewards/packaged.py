"""What the CLIPs that ship with this package can read: they are toys, made for the demo, and know
the words of the shapes world alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tiltflow.core.paths import PACKAGED, resolve_path

CLIP, CLIP_HELDOUT = "packaged:clip", "packaged:clip_heldout"
VIT_L_14 = "openai/clip-vit-large-patch14"
"""The CLIP that general prompts are scored by."""
CLIP_WEIGHTS = {"clipscore": CLIP, "clipscore_heldout": CLIP_HELDOUT}
"""The builtin rewards that are any CLIP's cosine, and whose weights each takes where none are
given."""


def check_words(text: str, clip: str) -> None:
    """Passes a text all of which the CLIP at `clip` reads, if that is a packaged one; of any other
    every text. To a packaged one unknown words are letters or nothing, and it cuts long texts, so
    that texts would score alike.

    Raises:
        ValueError: naming the text, and its first word that is unknown.
    """
    if not clip.startswith(PACKAGED):
        return
    known, most = _vocabulary(clip)
    words = text.lower().split()
    unknown = next((word for word in words if word not in known), None)
    if unknown is None and len(words) <= most:
        return
    what = f"it has {len(words)}" if unknown is None else f"{unknown!r} is none of them"
    raise ValueError(
        f"{clip} cannot read {text!r}: it is the demo's toy and reads up to {most} words of the "
        f"shapes world, but {what}; give a real CLIP in its place, such as {VIT_L_14}"
    )


@cache
def _vocabulary(clip: str) -> tuple[frozenset[str], int]:
    """The words that are tokens of their own, and how many there may be in a text."""
    folder = Path(resolve_path(clip))
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ends = frozenset(token.removesuffix("</w>") for token in tokens if token.endswith("</w>"))
    return ends, config["text_config"]["max_position_embeddings"] - 2  # its beginning and its end
