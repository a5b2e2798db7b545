"""A reward that was fitted to choices (`tiltflow fit-reward`): linear on frozen CLIP features.

With unit features f of the image and t of the prompt the score is w · φ, φ = (f, √D f · t): a taste
whatever the prompt says, and one number for how well the image fits the prompt (CLIPScore). The
factor √D gives that number the variance, over unrelated directions, that f has in all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.disk import parse_json
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.fitted import FITTED
from tiltflow.rewards.weights import read_state_dict
from tiltflow.rewards.zoo.clip_family import CLIPScore

FORMAT = "tiltflow-fitted-reward-1"
HEAD = "head.safetensors"
CLIP_WHOLE = "clip_whole_digest"
"""The key of `whole_identity` in a fit's facts."""


def features(clip: CLIPScore, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """φ (B, D + 1) fp32 of images (B, 3, H, W) in [0, 1] and prompts; differentiable in images."""
    seen, read = clip.image_features(images), clip.text_features(prompts)
    fits = math.sqrt(seen.shape[-1]) * (seen * read).sum(-1, keepdim=True)
    return torch.cat([seen, fits], -1)


def identity(clip: CLIPScore) -> str:
    """The digest by which earlier versions knew a CLIP again: that of its two projections."""
    digest = hashlib.sha256()
    for layer in (clip.model.visual_projection, clip.model.text_projection):
        digest.update(layer.weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def whole_identity(clip: CLIPScore) -> str:
    """A digest of all that a CLIP's features depend on: every weight as it was loaded (so not in
    which files it lay), what is done to images, and the tokenizer's words."""
    facts = {
        "weights": adapter_fingerprint(clip.model.state_dict()),
        "images": asdict(clip.preprocessing),
        "words": sorted(clip.tokenizer.get_vocab().items()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class FittedReward:
    """The score of `path`, a folder that `tiltflow fit-reward` wrote: mean 0 and standard deviation
    1 over the images of the choices. Differentiable.

    Raises:
        ValueError: if the folder does not hold such a reward, or its CLIP is not there or another.
    """

    differentiable = True
    domain = "images"

    def __init__(
        self, path: str, device: str | torch.device = "cpu", name: str | None = None
    ) -> None:
        self.name = path if name is None else name
        about = read_facts(Path(path))
        self.clip = CLIPScore(about["clip"], device, self.name)
        self.at_once = self.clip.at_once
        # a fit of an earlier version says what the projections are, and no more
        known = whole_identity if CLIP_WHOLE in about else identity
        if known(self.clip) != about.get(CLIP_WHOLE, about["clip_digest"]):
            raise ValueError(
                f"reward {self.name!r} was fitted on another CLIP than {about['clip']}"
            )
        head = read_state_dict(Path(path) / HEAD)
        width = self.clip.model.config.projection_dim + 1
        shapes = {key: tuple(value.shape) for key, value in head.items()}
        if shapes != {"weight": (width,), "bias": ()}:
            raise ValueError(f"{Path(path) / HEAD} does not hold the head of such a reward")
        self.weight, self.bias = (head[k].float().to(device) for k in ("weight", "bias"))

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            found = features(self.clip, images, prompts)
            scores: Tensor = (found * self.weight).sum(-1) + self.bias
        return scores.to(images.device)


def read_facts(folder: Path) -> Mapping[str, Any]:
    """What a folder of a fitted reward says of it.

    Raises:
        ValueError: if its file is missing or says something else.
    """
    file = folder / FITTED
    try:
        about = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read") from error
    texts = ("clip", "clip_digest")
    if (
        not isinstance(about, dict)
        or about.get("format") != FORMAT
        or not all(isinstance(about.get(key), str) for key in texts)
        or not isinstance(about.get(CLIP_WHOLE, ""), str)
    ):
        raise ValueError(f"{file} does not describe a fitted reward ({FORMAT})")
    return about


def facts_text(about: Mapping[str, Any]) -> str:
    """The file of `read_facts`."""
    return json.dumps({"format": FORMAT, **about}, indent=2, allow_nan=False) + "\n"
