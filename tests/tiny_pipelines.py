"""Tiny random pipelines of every family, made without a hub and alike for a seed.

Eight-fold autoencoders, so that 64 pixels are 8×8 latent cells and 16 image tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

RESOLUTION = 64
TOKENS = 32
"""A `max_sequence_length` for all of them; the CLIP towers have 16."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHAT.replace(
    "{% endif %}",
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}",
)
"""A template that says something else without thinking."""


def clip_tokenizer() -> CLIPTokenizer:
    """One token a byte; BOS and EOS have the highest ids, which CLIP's pooling relies on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def clip_tower(
    model: type, tokenizer: CLIPTokenizer, width: int = 32, layers: int = 2, heads: int = 2
) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model(config)


def t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [*special, *((letter, -3.0) for letter in string.ascii_letters)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    return T5EncoderModel(config), tokenizer


def qwen3() -> tuple[Qwen3ForCausalLM, Qwen2TokenizerFast]:
    """28 layers, because the pipeline reads hidden states 9, 18 and 27."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config), tokenizer


def autoencoder(scaling: float, shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def autoencoder_flux2() -> AutoencoderKLFlux2:
    """With batch-norm statistics drawn: left at 0 and 1, a missing normalisation goes unseen."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def sd3(dual: bool, with_t5: bool = True, norm: str | None = None) -> StableDiffusion3Pipeline:
    """SD3-M, SD3.5-M with its dual attention and query-key norm, or SD3.5-L with the norm alone;
    T5 may be left out."""
    extra = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} if dual else {"qk_norm": norm}
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        **extra,
    )
    tokenizer = clip_tokenizer()
    encoder_3, tokenizer_3 = t5(64) if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609),
        text_encoder=clip_tower(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip_tower(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(distilled: bool) -> FluxPipeline:
    """FLUX.1-dev, with the guidance scale as an input, or FLUX.1-schnell without."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer = clip_tokenizer()
    encoder_2, tokenizer_2 = t5(32)
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if distilled else {"shift": 1.0}
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=autoencoder(0.3611, 0.1159),
        text_encoder=clip_tower(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )


def klein(distilled: bool) -> Flux2KleinPipeline:
    """klein-base, or klein: the same text encoder and autoencoder, another transformer."""
    encoder, tokenizer = qwen3()
    vae = autoencoder_flux2()
    if distilled:
        torch.manual_seed(1000 + torch.initial_seed())
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )


def z_image(turbo: bool, wide: bool = False) -> ZImagePipeline:
    """Z-Image, or Turbo: another transformer and another shift; `wide` has other sizes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2TokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = THINKING
    width = 24 if wide else 16
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4 if wide else 3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    encoder, vae = Qwen3Model(config), autoencoder(0.3611, 0.1159)
    if turbo:
        torch.manual_seed(1000 + torch.initial_seed())
    transformer = ZImageTransformer2DModel(
        dim=60 if wide else 32,
        n_layers=3 if wide else 2,
        n_refiner_layers=1,
        n_heads=3 if wide else 2,
        n_kv_heads=3 if wide else 2,
        cap_feat_dim=width,
        axes_dims=(8, 6, 6) if wide else (4, 6, 6),
        axes_lens=(640, 64, 64),
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3m": lambda: sd3(dual=False),
    "sd3m_without_t5": lambda: sd3(dual=False, with_t5=False),
    "sd35m": lambda: sd3(dual=True),
    "sd35l": lambda: sd3(dual=False, norm="rms_norm"),
    "flux_dev": lambda: flux(distilled=True),
    "flux_schnell": lambda: flux(distilled=False),
    "klein_base": lambda: klein(distilled=False),
    "klein": lambda: klein(distilled=True),
    "z_image": lambda: z_image(turbo=False),
    "z_image_wide": lambda: z_image(turbo=False, wide=True),
    "z_image_turbo": lambda: z_image(turbo=True),
}


def build(name: str, directory: Path, seed: int = 0) -> Path:
    """Writes the pipeline `name` into `directory`, and returns that. It is one of `BUILDERS`, here
    or in `other_sizes` or `tiny_qwen`."""
    from other_sizes import BUILDERS as OTHERS  # which takes tokenizers from here
    from tiny_chroma import BUILDERS as CHROMA
    from tiny_flux2_dev import BUILDERS as FLUX2
    from tiny_qwen import BUILDERS as QWEN
    from tiny_qwen21 import BUILDERS as QWEN21
    from tiny_sana import BUILDERS as SANA
    from tiny_wan import BUILDERS as WAN

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = {**BUILDERS, **OTHERS, **SANA, **CHROMA, **FLUX2, **QWEN, **QWEN21, **WAN}[name]
        found().save_pretrained(directory)
    return directory
