"""Tiny random Wan 2.1 pipelines, as those of `tiny_pipelines`."""

from __future__ import annotations

import string
from collections.abc import Callable

from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_qwen import autoencoder
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel


def umt5(width: int, layers: int) -> tuple[UMT5EncoderModel, T5TokenizerFast]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [*special, *((letter, -3.0) for letter in (*string.ascii_letters, *"'&<>"))]
    config = UMT5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=layers, num_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    return UMT5EncoderModel(config), T5TokenizerFast(vocab=pieces, extra_ids=0)


def wan(wide: bool = False) -> WanPipeline:
    """Eight-fold; `wide` has other sizes throughout, no norm before its second attention and
    another scheduler than the published ones."""
    width, channels = (24, 4) if wide else (16, 8)
    encoder, tokenizer = umt5(width, 3 if wide else 2)
    vae = autoencoder(wide, AutoencoderKLWan)
    transformer = WanTransformer3DModel(
        num_attention_heads=3 if wide else 2,
        attention_head_dim=20 if wide else 16,
        in_channels=channels,
        out_channels=channels,
        text_dim=width,
        freq_dim=12 if wide else 16,
        ffn_dim=40 if wide else 48,
        num_layers=3 if wide else 2,
        cross_attn_norm=not wide,
        rope_max_seq_len=32,
    )
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0) if wide else solver,
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan": wan,
    "wan_wide": lambda: wan(wide=True),
}
