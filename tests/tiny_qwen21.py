"""Tiny random Qwen-Image-2.1 pipelines, as those of `tiny_qwen`.

Its processor's own class cannot be made without torchvision. In its place in `transformers` comes
one that has the tokenizer alone, so that diffusers saves and loads these pipelines as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from diffusers import (
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from tiny_flux2_dev import TEMPLATE
from tiny_qwen import eye, language, tokenizer
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tiltflow.models.pipelines.processor import TextProcessor


class Qwen3VLProcessor(TextProcessor):
    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> Qwen3VLProcessor:
        return cls(AutoTokenizer.from_pretrained(folder))


Qwen3VLProcessor.__module__ = "transformers"
transformers.Qwen3VLProcessor = Qwen3VLProcessor


def qwen_image_21(wide: bool = False) -> QwenImage21Pipeline:
    words, width = tokenizer(), 24 if wide else 16
    words.chat_template = TEMPLATE
    encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=language(len(words), width, 3 if wide else 2) | {"head_dim": width // 2},
            vision_config=eye(width) | {"deepstack_visual_indexes": [0]},
        )
    )
    channels = 6 if wide else 8
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=6 if wide else 4,
        z_dim=channels,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, False, True, True] if wide else [False, True, True, True],
        latents_mean=[0.1 * i - 0.33 for i in range(channels)],
        latents_std=[1.3 + 0.17 * i for i in range(channels)],
    )
    vae.decoder.conv_out.weight.data *= 3  # pictures with some contrast
    transformer = QwenImage21Transformer2DModel(
        in_channels=channels,
        out_channels=None if wide else channels,
        num_layers=3 if wide else 2,
        attention_head_dim=20 if wide else 16,
        num_attention_heads=3 if wide else 2,
        context_in_dim=width,
        mlp_ratio=2 if wide else 3,
        axes_dims_rope=(8, 6, 6) if wide else (4, 6, 6),
        causal_condition=not wide,
    )
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * parameter.data.new_empty(parameter.shape).normal_())
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vae,
        text_encoder=encoder,
        processor=Qwen3VLProcessor(words),
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "qwen_image_21": lambda: qwen_image_21(),
    "qwen_image_21_wide": lambda: qwen_image_21(wide=True),
}
