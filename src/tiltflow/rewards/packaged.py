"""What the CLIPs that ship with this package can read: they are toys, made for the demo, and know
no words but those of the shapes world."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tiltflow.core.paths import PACKAGED, resolve_path

CLIP, CLIP_HELDOUT = "packaged:clip", "packaged:clip_heldout"
VIT_L_14 = "openai/clip-vit-large-patch14"
"""The CLIP that general prompts are scored by."""
PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_WEIGHTS = {"clipscore": CLIP, "clipscore_heldout": CLIP_HELDOUT}
"""The builtin rewards that are any CLIP's cosine, and whose weights each takes where none are
given."""


def check_words(text: str, clip: str) -> None:
    """Passes a text that the CLIP at `clip` reads as another than all others, if that is a packaged
    one; of any other every text. A packaged one spells words that it does not know by their
    letters, cuts what is then too long, and takes all signs that it does not know for one.

    Raises:
        ValueError: naming the text, and what it has too much of.
    """
    if not clip.startswith(PACKAGED):
        return
    known, most = _vocabulary(clip)
    words = text.lower().split()
    if len(words) <= most and known.issuperset(words):
        return
    tokenizer = _tokenizer(clip)
    tokens = tokenizer.tokenize(text)
    strange = [sign for sign in text if tokenizer.unk_token in tokenizer.tokenize(sign)]
    if strange:
        what = f"does not know {strange[0]!r}"
    elif len(tokens) > most:
        what = f"reads {most} tokens, of which this would take {len(tokens)}"
    else:
        return
    raise ValueError(
        f"{clip} cannot read {text!r}: it is a toy for the demo's shapes and {what}; give a real "
        f"CLIP in its place, such as {VIT_L_14}"
    )


@cache
def _vocabulary(clip: str) -> tuple[frozenset[str], int]:
    """The words that are tokens of their own, and how many tokens there may be in a text."""
    folder = Path(resolve_path(clip))
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ends = frozenset(token.removesuffix("</w>") for token in tokens if token.endswith("</w>"))
    return ends, config["text_config"]["max_position_embeddings"] - 2  # its beginning and its end


@cache
def _tokenizer(clip: str) -> Any:
    from transformers import CLIPTokenizer  # takes seconds, and few texts need it

    # without its length, beyond which it warns
    return CLIPTokenizer.from_pretrained(resolve_path(clip), model_max_length=2**31)
