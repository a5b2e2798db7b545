"""What reward models hold on the device: their weights, counted before anything of them loads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tiltflow.paths import resolve_path
from tiltflow.rewards.base import REMOTE

VIT_H, VIT_L, MASK2FORMER = 986_109_441, 427_616_513, 68_757_000
PUBLISHED = {
    "aesthetic": VIT_L,
    "geneval": MASK2FORMER + VIT_L,
    "geneval2": 8_767_123_696,
    "hpsv2": VIT_H,
    "hpsv3": 8_291_375_616,
    "image_reward": 447_000_000,
    "pickscore": VIT_H,
}
"""Parameters of the published weights, to a percent where their authors give no number."""

HUB = {
    "openai/clip-vit-large-patch14": VIT_L,
    "openai/clip-vit-large-patch14-336": VIT_L,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H,
}
"""Parameters of the CLIPs that recipes name for `clipscore`."""

BESIDE = {"aesthetic": VIT_L, "geneval": VIT_L}
"""What a reward loads beside the weights that its path names."""

HALF = ("hpsv3", "geneval2")
"""Published to run in bf16; the others are fp32."""

NOTHING = ("linear", "shapes", "shapes_soft", "ocr")
"""Rewards without weights on the device."""

PACKAGED = {"clipscore": "packaged:clip", "clipscore_heldout": "packaged:clip_heldout"}


def reward_bytes(name: str, path: str | None, options: Mapping[str, Any]) -> int | None:
    """The bytes of a reward's weights on the device; None where they are not known: those of a
    reward of one's own, or of an unknown model that is on the hub."""
    if name.startswith(REMOTE) or name in NOTHING:
        return 0
    wide = options.get("dtype") == "fp32" or name not in HALF
    size = 4 if wide else 2
    path = path or PACKAGED.get(name)
    if path is None:
        return PUBLISHED[name] * size if name in PUBLISHED else None
    if path in HUB and name in PACKAGED:
        return HUB[path] * size
    folder = Path(resolve_path(path))
    if (name not in PUBLISHED and name not in PACKAGED) or not folder.exists():
        return None
    return (_parameters(folder) + BESIDE.get(name, 0)) * size


def _parameters(place: Path) -> int:
    """The numbers in the weights of a folder or a file: by their headers, or four bytes each."""
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    files = files or [f for f in sorted(place.iterdir()) if f.suffix in (".bin", ".pt", ".pth")]
    return sum(_numbers(file) for file in files)


def _numbers(file: Path) -> int:
    if file.suffix != ".safetensors":
        return file.stat().st_size // 4
    try:
        with safe_open(file, framework="pt") as weights:
            names: Iterable[str] = weights.keys()
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error})") from error
