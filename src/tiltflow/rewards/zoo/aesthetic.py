"""The LAION aesthetic predictor: how much people would like an image, whatever its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltflow.rewards.base import Metadata
from tiltflow.rewards.packaged import VIT_L_14
from tiltflow.rewards.weights import (
    frozen,
    load_exactly,
    read_state_dict,
    scoring_mlp,
    weights_file,
)
from tiltflow.rewards.zoo.clip_family import CLIPScore

PREDICTOR = "trl-lib/ddpo-aesthetic-predictor"
PREDICTOR_FILE = "aesthetic-model.pth"  # sac+logos+ava1-l14-linearMSE.pth under another name


class Aesthetic:
    """A rating of about 1 to 10 by an MLP on the unit image features of CLIP ViT-L/14.

    After christophschuhmann/improved-aesthetic-predictor (`simple_inference.py`, the weights
    sac+logos+ava1-l14-linearMSE). `path` is the MLP's file, or a directory or hub id that holds
    `file`; `clip` the CLIP.

    Raises:
        ValueError: if either cannot be loaded, or they do not fit together.
    """

    name = "aesthetic"
    differentiable = True
    domain = "images"

    def __init__(
        self,
        path: str = PREDICTOR,
        device: str | torch.device = "cpu",
        *,
        clip: str = VIT_L_14,
        file: str = PREDICTOR_FILE,
        at_once: int = 1,
    ) -> None:
        weights = read_state_dict(weights_file(path, file))
        self.clip = CLIPScore(clip, device, self.name, at_once=at_once)
        self.at_once = self.clip.at_once
        named = {key.removeprefix("layers."): value.float() for key, value in weights.items()}
        head = scoring_mlp(self.clip.model.config.projection_dim)
        load_exactly(head, named, "the aesthetic predictor")
        self.head = frozen(head, device, torch.float32)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        features = self.clip.image_features(images)
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(features).squeeze(-1)
        return scores.to(images.device)
