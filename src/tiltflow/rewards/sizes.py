"""What the models of rewards take in memory, from configurations alone: no weight is read.

A local directory's own configuration, or the facts of the published repositories below (their
`config.json`; what a class's defaults say already is left out).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from tiltflow.core.paths import resolve_path
from tiltflow.core.sentences import first_sentence
from tiltflow.rewards.base import BUILTIN
from tiltflow.rewards.fitted import fitted_folder, is_fitted
from tiltflow.rewards.packaged import CLIP_WEIGHTS, PICKSCORE, VIT_L_14
from tiltflow.rewards.remote.address import ELSEWHERE, JUDGE
from tiltflow.rewards.weights import DTYPES, scoring_mlp
from tiltflow.rewards.zoo.geneval import MASK2FORMER
from tiltflow.rewards.zoo.geneval2 import QWEN3_VL
from tiltflow.rewards.zoo.hpsv3 import QWEN2_VL, reward_head
from tiltflow.rewards.zoo.image_reward import BlipScorer
from tiltflow.rewards.zoo.preference import VIT_H_14
from tiltflow.rewards.zoo.votes import read_facts

_VIT_L: dict[str, Any] = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14,
    },
    "projection_dim": 768,
}  # fmt: skip
_VIT_H: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "patch_size": 14,
    },
    "projection_dim": 1024,
}  # fmt: skip
_SWIN_SMALL = {
    "model_type": "swin",
    "depths": [2, 2, 18, 2],
    "embed_dim": 96,
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    VIT_L_14: ("CLIPModel", _VIT_L),
    VIT_H_14: ("CLIPModel", _VIT_H),
    PICKSCORE: ("CLIPModel", _VIT_H),
    MASK2FORMER: (
        "Mask2FormerForUniversalSegmentation",
        {"backbone_config": _SWIN_SMALL, "num_queries": 100, "num_labels": 80},
    ),
    QWEN2_VL: (
        "Qwen2VLModel",
        {
            "text_config": {
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            },
            "vision_config": {
                "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4,
                "hidden_size": 3584,
            },
        },
    ),
    QWEN3_VL: (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "vocab_size": 151936,
            },
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                "out_hidden_size": 4096, "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
"""Models of the hub that rewards are made of: their class and configuration."""

BLIP_L: tuple[dict[str, Any], dict[str, Any]] = (
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
     "num_attention_heads": 16, "image_size": 224, "patch_size": 16},
    {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024,
     "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
     "max_position_embeddings": 512, "is_decoder": True},
)  # fmt: skip
"""ImageReward's two encoders: `configs/med_config.json` and ViT-L of THUDM/ImageReward."""

NO_MODEL = ("linear", "ocr", "shapes", "shapes_soft")
"""Rewards that put nothing on the run's device."""


class RewardLike(Protocol):
    """What a config says of a reward."""

    @property
    def path(self) -> str | None: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


def reward_memory(table: Mapping[str, RewardLike]) -> dict[str, int | None]:
    """The bytes that each reward's weights take on the run's device, by name. 0: a reward without
    a model there, as those behind a server. None: nobody can tell (one's own; a hub id that is not
    published here).

    Raises:
        ValueError: naming the directory that holds no configuration, or none of such a model.
    """
    return {name: _bytes(name, reward) for name, reward in table.items()}


def _bytes(name: str, reward: RewardLike) -> int | None:
    if name.startswith(JUDGE) and reward.path is not None:
        with torch.device("meta"):
            judge = _model(reward.path, "AutoModelForImageTextToText")
        return None if judge is None else _width(reward.options) * _count(judge)
    if name in NO_MODEL or name.startswith(ELSEWHERE):
        return 0
    if is_fitted(name):
        clip = read_facts(fitted_folder(name))["clip"]
        with torch.device("meta"):
            fitted = _model(str(clip), "CLIPModel")
        return None if fitted is None else 4 * _count(fitted)
    if name not in BUILTIN:
        return None
    chosen = reward.options
    with torch.device("meta"):
        if name == "image_reward":
            vision, text = BLIP_L
            blip = BlipScorer(
                transformers.BlipVisionConfig(**vision), transformers.BlipTextConfig(**text)
            )
            return 4 * _count(blip)
        if name == "hpsv3":
            body = _model(str(chosen.get("base", QWEN2_VL)), "Qwen2VLModel")
            if body is None:
                return None
            width = body.config.text_config.hidden_size
            return _width(chosen) * _count(body) + 4 * _count(reward_head(int(width)))
        if name == "geneval2":
            asked = _model(reward.path or QWEN3_VL, "Qwen3VLForConditionalGeneration")
            return None if asked is None else _width(chosen) * _count(asked)
        models = [_model(place, kind) for place, kind in _parts(name, reward)]
        if any(model is None for model in models):
            return None
        total = sum(_count(model) for model in models if model is not None)
        if name == "aesthetic":
            total += _count(scoring_mlp(models[0].config.projection_dim))
    return 4 * total


def _parts(name: str, reward: RewardLike) -> list[tuple[str, str]]:
    """Where the configurations of a reward's fp32 models are, and their classes."""
    clip = str(reward.options.get("clip", VIT_L_14))
    if name == "geneval":
        detector = (reward.path or MASK2FORMER, "Mask2FormerForUniversalSegmentation")
        return [detector, (clip, "CLIPModel")]
    place = {
        "aesthetic": clip,
        **{clip: reward.path or weights for clip, weights in CLIP_WEIGHTS.items()},
        "hpsv2": str(reward.options.get("base", VIT_H_14)),
        "pickscore": reward.path or PICKSCORE,
    }[name]
    return [(place, "CLIPModel")]


def _model(place: str, kind: str) -> Any:
    """The model of a directory's configuration or of a published id; None where it is neither."""
    folder, made = Path(resolve_path(place)), getattr(transformers, kind)
    if not folder.is_dir():
        known, facts = PUBLISHED.get(place, ("", {}))
        return made(made.config_class(**facts)) if known == kind else None
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no configuration of a model in {place}")
    try:
        if kind.startswith("Auto"):
            return made.from_config(transformers.AutoConfig.from_pretrained(folder))
        return made(made.config_class.from_pretrained(folder))
    except Exception as error:  # whatever a configuration can make of the library
        raise ValueError(
            f"{folder / 'config.json'} describes no {kind}: {first_sentence(error)}"
        ) from error


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _width(options: Mapping[str, Any]) -> int:
    """Bytes a parameter of a model whose precision is an option; published: bf16."""
    return DTYPES.get(str(options.get("dtype", "bf16")), torch.bfloat16).itemsize
