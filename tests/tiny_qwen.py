"""Tiny random pipelines with Qwen-Image's autoencoder: Qwen-Image and Krea 2, of two sizes each.

Their pipelines drop 34 tokens of a template, or count on 5 behind the prompt: so the template's
words are tokens here too, and everything else is a token a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3VLConfig,
    Qwen3VLModel,
)

WORDS = [
    *("system", "user", "assistant", "Describe"),
    *(" the", " image", " by", " detailing", " color", " shape", " size", " texture", " quantity"),
    *(" text", " spatial", " relationships", " of", " objects", " and", " background"),
]


def tokenizer() -> Qwen2TokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2TokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens(WORDS)
    return made


def autoencoder(wide: bool, kind: Any = AutoencoderKLQwenImage) -> Any:
    """Eight-fold; its statistics are no round numbers. `kind` may be Wan's, a class alike."""
    channels = 4 if wide else 8
    return kind(
        base_dim=6 if wide else 4,
        z_dim=channels,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, False, True] if wide else [False, True, True],
        latents_mean=[0.1 * i - 0.33 for i in range(channels)],
        latents_std=[1.3 + 0.17 * i for i in range(channels)],
    )


def eye(width: int) -> dict[str, object]:
    """The vision tower, which text never goes through."""
    return {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
    }


def language(words: int, width: int, layers: int) -> dict[str, object]:
    return {
        "vocab_size": words,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [width // 4 - 2, 1, 1],
        },
    }


def qwen_image(wide: bool = False) -> QwenImagePipeline:
    words, width = tokenizer(), 24 if wide else 16
    text = language(len(words), width, 3 if wide else 2)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=eye(width))
    )
    channels = 4 if wide else 8
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=3 if wide else 2,
        attention_head_dim=20 if wide else 16,
        num_attention_heads=3 if wide else 2,
        joint_attention_dim=width,
        axes_dims_rope=(8, 6, 6) if wide else (4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=autoencoder(wide),
        text_encoder=encoder,
        tokenizer=words,
        transformer=transformer,
    )


def krea2(turbo: bool = False, wide: bool = False) -> Krea2Pipeline:
    """Raw, or Turbo with another transformer and another shift; `wide` has other sizes throughout,
    other states of its text encoder and no patches."""
    words, width, states = tokenizer(), 24 if wide else 16, (3, 1) if wide else (0, 1, 2)
    encoder = Qwen3VLModel(
        Qwen3VLConfig(
            text_config=language(len(words), width, 4 if wide else 3) | {"head_dim": width // 2},
            vision_config=eye(width) | {"deepstack_visual_indexes": [0]},
        )
    )
    vae = autoencoder(wide)
    vae.decoder.conv_out.weight.data *= 3  # pictures with some contrast
    if turbo:
        torch.manual_seed(1000 + torch.initial_seed())
    transformer = Krea2Transformer2DModel(
        in_channels=4 if wide else 32,
        num_layers=3 if wide else 2,
        attention_head_dim=20 if wide else 16,
        num_attention_heads=3 if wide else 2,
        num_key_value_heads=1,
        intermediate_size=72 if wide else 48,
        timestep_embed_dim=12 if wide else 16,
        text_hidden_dim=width,
        num_text_layers=len(states),
        text_num_attention_heads=3 if wide else 2,
        text_num_key_value_heads=3 if wide else 1,
        text_intermediate_size=40 if wide else 20,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=2 if wide else 1,
        axes_dims_rope=(8, 6, 6) if wide else (4, 6, 6),
    )
    for name, parameter in transformer.named_parameters():
        if "scale_shift_table" in name or ".norm" in name:  # zeros as they are made
            parameter.data.normal_(std=0.5)
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        transformer=transformer,
        text_encoder_select_layers=states,
        is_distilled=turbo,
        patch_size=1 if wide else 2,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "krea2": lambda: krea2(),
    "krea2_wide": lambda: krea2(wide=True),
    "krea2_turbo": lambda: krea2(turbo=True),
    "qwen_image": lambda: qwen_image(),
    "qwen_image_wide": lambda: qwen_image(wide=True),
}
