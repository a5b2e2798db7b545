"""Tiny random pipelines with Qwen-Image's autoencoder: Qwen-Image and Krea 2, of two sizes each.

Their pipelines drop 34 tokens of a template, or count on 5 behind the prompt: so the template's
words are tokens here too, and everything else is a token a byte.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
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


def autoencoder(wide: bool) -> AutoencoderKLQwenImage:
    """Eight-fold; its statistics are no round numbers."""
    channels = 4 if wide else 8
    return AutoencoderKLQwenImage(
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


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "qwen_image": lambda: qwen_image(),
    "qwen_image_wide": lambda: qwen_image(wide=True),
}
