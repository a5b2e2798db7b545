"""Tiny random FLUX.2-dev pipelines, as those of `tiny_pipelines`. The system message, which is
longer than any prompt here, is one token."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import pre_tokenizers
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen2TokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
"""Of messages whose content is a list, as the pipeline's are."""


def tokenizer() -> Qwen2TokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2TokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens([SYSTEM_MESSAGE])
    made.chat_template = TEMPLATE
    return made


def autoencoder(wide: bool) -> AutoencoderKLFlux2:
    """With batch-norm statistics drawn."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 16) if wide else (8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16 if wide else 32,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def flux2_dev(wide: bool = False) -> Flux2Pipeline:
    """30 layers and more, because the pipeline reads hidden states 10, 20 and 30."""
    words, width = tokenizer(), 24 if wide else 16
    text = {
        "model_type": "mistral",
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 32 if wide else 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    eye = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eye))
    vae = autoencoder(wide)
    transformer = Flux2Transformer2DModel(
        in_channels=64 if wide else 128,
        num_layers=3 if wide else 2,
        num_single_layers=3 if wide else 2,
        attention_head_dim=24 if wide else 16,
        num_attention_heads=3 if wide else 4,
        joint_attention_dim=3 * width,
        axes_dims_rope=(6, 6, 6, 6) if wide else (4, 4, 4, 4),
    )
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux2_dev": lambda: flux2_dev(),
    "flux2_dev_wide": lambda: flux2_dev(wide=True),
}
