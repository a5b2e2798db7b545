"""CLIPs fine-tuned on human preferences: PickScore and HPSv2.1."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig

from tiltflow.core.paths import resolve_path
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.packaged import PICKSCORE
from tiltflow.rewards.packages import require_packages
from tiltflow.rewards.weights import absent, read_state_dict, weights_file
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.rewards.zoo.open_clip import clip_from_open_clip

PICKSCORE_NORM = 26.0  # what Flow-GRPO's pickscore_scorer.py divides by, to reach about [0, 1]
HPSV2 = "xswu/HPSv2"
HPSV2_FILE = "HPS_v2.1_compressed.pt"  # hpsv2/utils.py of tgxs002/HPSv2, version v2.1
VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what both were fine-tuned from


class PickScore(CLIPScore):
    """exp(logit scale) · cos(image, prompt), about 15 to 27 (Kirstain et al., arXiv 2305.01569).

    `path` holds a `CLIPModel`; `processor`, by default the same, its tokenizer and
    `preprocessor_config.json`. With `normalised` the score is divided by 26, as in training runs
    where its size has to be like that of other rewards (`tilt.reward_target`).

    Raises:
        ValueError: if any of them cannot be loaded.
    """

    def __init__(
        self,
        path: str = PICKSCORE,
        device: str | torch.device = "cpu",
        *,
        processor: str | None = None,
        normalised: bool = False,
        at_once: int = 1,
    ) -> None:
        super().__init__(path, device, "pickscore", processor=processor, at_once=at_once)
        self.scale = float(self.model.logit_scale.exp()) / (PICKSCORE_NORM if normalised else 1)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return self.scale * super().__call__(images, prompts, metadata)


class HPSv2(CLIPScore):
    """cos(image, prompt) under HPSv2.1, about 0.1 to 0.4 (Wu et al., arXiv 2306.09341).

    `path` is the published checkpoint in open_clip's names, a directory or hub id that holds
    `file`, or a `.safetensors` of the same. `base` is the ViT-H-14 that gives configuration,
    tokenizer and, of `preprocessor_config.json`, mean and deviation; its weights are not read.

    An image is seen whole: its longest side becomes the model's size, and black fills the square.
    That is what `hpsv2/img_score.py` asks open_clip for (hpsv2 1.2.0), not the base's own crop.
    Prompts are mended as its tokenizer does, which the base's own does not.

    Raises:
        ValueError: if any of them cannot be loaded, or they do not fit together, or `ftfy` is not
            installed.
    """

    def __init__(
        self,
        path: str = HPSV2,
        device: str | torch.device = "cpu",
        *,
        base: str = VIT_H_14,
        file: str = HPSV2_FILE,
        at_once: int = 1,
    ) -> None:
        require_packages("hpsv2")
        try:
            config = CLIPConfig.from_pretrained(resolve_path(base))
        except OSError as error:
            raise ValueError(absent("CLIP", base, error)) from error
        model = clip_from_open_clip(read_state_dict(weights_file(path, file)), config)
        super().__init__(path, device, "hpsv2", processor=base, model=model, at_once=at_once)
        vision: Any = config.vision_config
        side = int(vision.image_size)
        self.preprocessing = replace(self.preprocessing, resize=side, crop=None, whole=True)

    def cleaned(self, prompt: str) -> str:
        """Typographic quotes, ligatures, full-width letters and broken encodings by ftfy, then HTML
        entities that were escaped up to twice: what the authors' tokenizer does before it reads."""
        from ftfy import fix_text

        return html.unescape(html.unescape(fix_text(prompt))).strip()
