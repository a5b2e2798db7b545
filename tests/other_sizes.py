"""Tiny pipelines of other sizes than `tiny_pipelines`: what an adapter must not take for granted.

Other numbers of layers, heads and channels, text towers of unequal widths, autoencoders of other
depths and with quantisation layers, absent encoders, and no 8×8 latent or 8-pixel cell.
"""

from __future__ import annotations

from collections.abc import Callable

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
)
from tiny_pipelines import clip_tokenizer, clip_tower, qwen3, t5
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def clip(model: type, tokenizer: CLIPTokenizer, width: int, layers: int) -> nn.Module:
    return clip_tower(model, tokenizer, width, layers, heads=4)


def autoencoder(widths: tuple[int, ...], latent: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=latent,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.9,
        shift_factor=-0.2,
    )


def sd3(
    widths: tuple[int, ...] = (4, 8, 8), patch: int = 2, absent: tuple[str, ...] = ()
) -> StableDiffusion3Pipeline:
    """Three heads of 8; CLIPs 16 and 24 wide; `absent` are text encoders left out."""
    tokenizer, (encoder_3, tokenizer_3) = clip_tokenizer(), t5(48)
    parts = {
        "text_encoder": clip(CLIPTextModelWithProjection, tokenizer, 16, 3),
        "tokenizer": tokenizer,
        "text_encoder_2": clip(CLIPTextModelWithProjection, tokenizer, 24, 4),
        "tokenizer_2": tokenizer,
        "text_encoder_3": encoder_3,
        "tokenizer_3": tokenizer_3,
    }
    for name in absent:
        parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    transformer = SD3Transformer2DModel(
        sample_size=12,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        pos_embed_max_size=10,
        dual_attention_layers=(1,),
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=autoencoder(widths, 4), **parts
    )


def flux(distilled: bool) -> FluxPipeline:
    tokenizer, (encoder_2, tokenizer_2) = clip_tokenizer(), t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 4, 4),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=not distilled),
        vae=autoencoder((4, 8, 8), 4),
        text_encoder=clip(CLIPTextModel, tokenizer, 16, 3),
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )


def klein(layers: int = 30) -> Flux2KleinPipeline:
    """klein-base on a text encoder of `layers` layers and its own head."""
    tokenizer, widths = qwen3()[1], (4, 8, 8)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=layers,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=8,
            tie_word_embeddings=False,
        )
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        sample_size=32,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=20,
        num_attention_heads=2,
        joint_attention_dim=72,
        axes_dims_rope=(4, 4, 6, 6),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "other_sd3": lambda: sd3(absent=("text_encoder_3",)),
    "other_sd3_patch_4": lambda: sd3(widths=(4, 8), patch=4),
    "other_sd3_without_clip_l": lambda: sd3(absent=("text_encoder",)),
    "other_sd3_without_clip_g": lambda: sd3(absent=("text_encoder_2",)),
    "other_sd3_t5_alone": lambda: sd3(absent=("text_encoder", "text_encoder_2")),
    "other_flux": lambda: flux(distilled=True),
    "other_flux_without_guidance": lambda: flux(distilled=False),
    "other_klein": klein,
    "other_klein_short": lambda: klein(layers=20),
}
