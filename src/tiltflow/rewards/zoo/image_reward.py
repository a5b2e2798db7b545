"""ImageReward: a BLIP that reads prompt and image together, with a scoring head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from tiltflow.core.paths import resolve_path
from tiltflow.rewards.base import Metadata
from tiltflow.rewards.batches import checked_at_once
from tiltflow.rewards.weights import (
    absent,
    frozen,
    load_exactly,
    read_state_dict,
    scoring_mlp,
    weights_file,
)
from tiltflow.rewards.zoo.clip_family import Preprocessing

IMAGE_REWARD = "THUDM/ImageReward"
IMAGE_REWARD_FILE = "ImageReward.pt"
BERT = "google-bert/bert-base-uncased"  # the tokenizer of BLIP's text encoder

# ImageReward.py of THUDM/ImageReward, v1.0: the raw score's mean and deviation, the longest
# prompt in tokens, and CLIP's normalisation of images.
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
CONTEXT = 35
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of an attention head, in ViT-L and BERT alike

_VISION = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)
"""BLIP's `vit.py` to transformers' `BlipVisionModel`; the text encoder's names are the same."""


class BlipScorer(nn.Module):
    """BLIP's image encoder, its text encoder with cross-attention, and the head: (B,) scores."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = scoring_mlp(text.hidden_size)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores before standardisation, of the text's first token having seen the image."""
        seen = self.vision(pixels).last_hidden_state
        words = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        )
        scores: Tensor = self.mlp(words.last_hidden_state[:, 0]).squeeze(-1)
        return scores


def blip_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's published weights under `BlipScorer`'s names.

    BLIP's projections for contrastive training, which the reward does not use, are left out.

    Raises:
        ValueError: on any other key that is unknown.
    """
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("mlp.layers."):
            named["mlp." + key.removeprefix("mlp.layers.")] = value
        elif key.startswith("blip.text_encoder."):
            if not key.endswith("position_ids"):
                named["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("blip.visual_encoder."):
            named["vision." + _vision_name(key.removeprefix("blip.visual_encoder."))] = value
        elif not re.match(r"blip\.(vision|text)_proj\.", key):
            raise ValueError(f"{key} is no weight of ImageReward")
    return named


def _vision_name(key: str) -> str:
    for pattern, replacement in _VISION:
        name, count = re.subn(f"^{pattern}", replacement, key)
        if count:
            return name
    raise ValueError(f"{key} is no weight of ImageReward's image encoder")


def blip_configs(named: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The sizes of a `BlipScorer`, read off its weights; heads are 64 wide.

    The epsilons are those of BLIP's `vit.py` (1e-6) and `med_config.json` (1e-12).

    Raises:
        ValueError: if the weights lack one that gives a size.
    """
    try:
        patch = named["vision.embeddings.patch_embedding.weight"]
        positions = named["vision.embeddings.position_embedding"]
        words = named["text.embeddings.word_embeddings.weight"]
        texts = named["text.embeddings.position_embeddings.weight"]
        vision_inner = named["vision.encoder.layers.0.mlp.fc1.weight"]
        text_inner = named["text.encoder.layer.0.intermediate.dense.weight"]
    except KeyError as error:
        raise ValueError(f"ImageReward's weights lack {error.args[0]}") from error
    width, size = patch.shape[0], patch.shape[-1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision_inner.shape[0],
        num_hidden_layers=_depth(named, "vision.encoder.layers"),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=size * round((positions.shape[1] - 1) ** 0.5),
        patch_size=size,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=width,
        intermediate_size=text_inner.shape[0],
        num_hidden_layers=_depth(named, "text.encoder.layer"),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=texts.shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # that the layers have cross-attention; the mask is not causal
    )
    return vision, text


def _depth(named: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in named)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


class ImageReward:
    """A preference score, about standard normal on its own data (Xu et al., arXiv 2304.05977).

    `path` is the published checkpoint or a `.safetensors` of the same weights, or a directory or
    hub id that holds `file`; `tokenizer` BERT's. Prompts are cut at 35 tokens, as published.

    Raises:
        ValueError: if either cannot be loaded, or they do not fit together.
    """

    name = "image_reward"
    differentiable = True
    domain = "images"

    def __init__(
        self,
        path: str = IMAGE_REWARD,
        device: str | torch.device = "cpu",
        *,
        tokenizer: str = BERT,
        file: str = IMAGE_REWARD_FILE,
        at_once: int = 1,
    ) -> None:
        named = blip_keys(read_state_dict(weights_file(path, file)))
        vision, text = blip_configs(named)
        model = BlipScorer(vision, text)
        load_exactly(model, named, "the ImageReward checkpoint")
        self.model = frozen(model, device, torch.float32)
        self.at_once = checked_at_once(at_once)
        self.device = torch.device(device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(resolve_path(tokenizer))
        except (OSError, ValueError) as error:
            raise ValueError(absent("tokenizer", tokenizer, error)) from error
        # BLIP adds [DEC] and [ENC] to BERT's vocabulary; no prompt is encoded with them.
        if len(self.tokenizer) > text.vocab_size:
            raise ValueError(
                f"the tokenizer at {tokenizer!r} has {len(self.tokenizer)} tokens, "
                f"the text encoder {text.vocab_size}"
            )
        side: Any = vision.image_size
        self.preprocessing = Preprocessing(side, (side, side), MEAN, STD)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        ).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.preprocessing(images.to(self.device, torch.float32))
            scores: Tensor = self.model(pixels, words.input_ids, words.attention_mask)
        return ((scores - SCORE_MEAN) / SCORE_STD).to(images.device)
