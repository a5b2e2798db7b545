"""GenEval as a reward: a detector finds objects, CLIP names their colours, rules judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

from tiltflow.rewards.base import Metadata
from tiltflow.rewards.packaged import VIT_L_14
from tiltflow.rewards.weights import frozen, load_pretrained
from tiltflow.rewards.zoo.clip_family import CLIPScore, image_processor
from tiltflow.rewards.zoo.geneval_rules import (
    COLOURS,
    GENEVAL_NAMES,
    Colours,
    Detection,
    Scene,
    check_classes,
    grade,
    judge,
    scene_of,
)

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
GREY = 0x99 / 255  # evaluate_images.py paints what is not the object in #999
COLOUR_PROMPTS = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")


Verdict = TypeVar("Verdict")


class Detector:
    """Mask2Former's instances in images; `path` holds a model trained on COCO and its processor.

    Raises:
        ValueError: if it cannot be loaded.
    """

    def __init__(self, path: str, device: str | torch.device) -> None:
        kind: Any = Mask2FormerForUniversalSegmentation
        model: Any = load_pretrained(kind, path, "Mask2Former", torch.float32)
        self.processor: Any = image_processor(Mask2FormerImageProcessorPil, path)
        self.model: Any = frozen(model, device, torch.float32)
        self.device = torch.device(device)
        names = model.config.id2label
        self.labels = [GENEVAL_NAMES.get(names[i], names[i]) for i in range(len(names))]

    def __call__(self, images: NDArray[np.uint8], floor: float) -> list[list[Detection]]:
        """The instances with a score above `floor` in each of (B, H, W, 3) images of one size."""
        return [self._detect(image, floor) for image in images]

    @torch.no_grad()
    def _detect(self, image: NDArray[np.uint8], floor: float) -> list[Detection]:
        # One image at a time: what is found in it must not depend on others.
        inputs = self.processor(images=[image], return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            outputs = self.model(**inputs)
        classes, masks = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
        return self._instances(classes, masks, image.shape[:2], floor)

    def _instances(
        self, classes: Tensor, masks: Tensor, size: tuple[int, int], floor: float
    ) -> list[Detection]:
        """Of one image, from class logits (Q, C + 1) and mask logits (Q, h, w).

        The Q likeliest of all pairs of query and class, each scored by its class probability times
        the mean probability inside its mask: Mask2Former's own rule for instances, masks and
        boxes at the image's size as in the detector that GenEval runs (mmdet's
        `maskformer_fusion_head.py`).
        """
        chances = classes.softmax(-1)[:, :-1]
        queries, kinds = chances.shape
        scores, chosen = chances.flatten().topk(queries)
        likely = scores > floor  # a mask's score is at most 1, so the others cannot pass
        scores, chosen = scores[likely], chosen[likely]
        logits = masks[chosen // kinds][None]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
        found = []
        for score, kind, mask in zip(scores, chosen % kinds, logits, strict=True):
            inside = mask > 0
            if not inside.any():
                continue
            sure = float(score * mask.sigmoid()[inside].mean())
            if sure > floor:
                rows, columns = (inside.any(axis).nonzero() for axis in (1, 0))
                low_high = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                left, top, right, bottom = (float(edge) for edge in low_high)
                label = self.labels[int(kind)]
                found.append(Detection(label, sure, (left, top, right, bottom), inside.cpu()))
        return found


class ColourClassifier:
    """Which of GenEval's ten colours an object has, by CLIP on its crop."""

    def __init__(self, path: str, device: str | torch.device) -> None:
        self.clip = CLIPScore(path, device, "geneval")

    @torch.no_grad()
    def __call__(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """The colours of objects of one class in an image (3, H, W) in [0, 1]."""
        crops = torch.cat([self.crop(image, found) for found in objects])
        similarity = self.clip.image_features(crops) @ self.directions(name).T
        return [COLOURS[i] for i in similarity.argmax(1).tolist()]

    def crop(self, image: Tensor, found: Detection) -> Tensor:
        """The object's box, grey outside its mask, at CLIP's size: (1, 3, h, w)."""
        if found.mask is not None:
            image = torch.where(found.mask.to(image.device), image, GREY)
        left, top, right, bottom = (round(edge) for edge in found.box)
        return self.clip.preprocessing.geometry(image[None, :, top:bottom, left:right])

    def directions(self, name: str) -> Tensor:
        """A unit vector a colour, (10, D): the mean over the templates of their features."""
        prompts = [text.format(c=colour, n=name) for colour in COLOURS for text in COLOUR_PROMPTS]
        features = self.clip.text_features(prompts).unflatten(0, (len(COLOURS), -1))
        return F.normalize(features.mean(1), dim=-1)


class GenEval:
    """1 where the image shows what its metadata in GenEval's format ask for, else 0.

    Needs metadata with `tag`, `include` and `exclude` (`data.prompts` reads its file).
    With `graded`, for training: partial credit instead (`geneval_rules.grade`), 1 where all is
    exactly as asked and below 0 where there is too much of something.
    `path` is the detector, `clip` names colours. The benchmark's own detector is mmdet's
    Mask2Former of the same architecture, so absolute figures may differ from published ones.

    Raises:
        ValueError: if either cannot be loaded, a prompt has no such metadata, or they name a
            class that the detector does not know.
    """

    name = "geneval"
    differentiable = False
    domain = "images"
    at_once = 1

    def __init__(
        self,
        path: str = MASK2FORMER,
        device: str | torch.device = "cpu",
        *,
        clip: str = VIT_L_14,
        graded: bool = False,
    ) -> None:
        if not isinstance(graded, bool):
            raise ValueError(f"graded is {graded!r}; it is true or false")
        self.graded = graded
        self.detector = Detector(path, device)
        self.colours = ColourClassifier(clip, device)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if self.graded:
            return torch.tensor(self._judged(grade, images, prompts, metadata))
        reasons = self.explain(images, prompts, metadata)
        return torch.tensor([float(not why) for why in reasons])

    def explain(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[list[str]]:
        """Why each image fails its prompt; empty where it does not."""
        return self._judged(judge, images, prompts, metadata)

    def _judged(
        self,
        by: Callable[[Scene, Sequence[Detection], Colours], Verdict],
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> list[Verdict]:
        """What `by` says of each image's detections."""
        scenes = [scene_of(about, text) for about, text in zip(metadata, prompts, strict=True)]
        for scene, text in zip(scenes, prompts, strict=True):
            check_classes(scene, self.detector.labels, text)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        verdicts = []
        for scene, array, image in zip(scenes, arrays, pixels.float() / 255, strict=True):
            (found,) = self.detector(array[None], scene.threshold)
            verdicts.append(by(scene, found, partial(self.colours, image)))
        return verdicts
