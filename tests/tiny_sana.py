"""Tiny random SANA pipelines, as those of `tiny_pipelines`."""

from __future__ import annotations

import string
from collections.abc import Callable

from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tiltflow.models.families.sana import INSTRUCTION


def gemma(width: int, layers: int) -> tuple[Gemma2Model, GemmaTokenizer]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    letters = [*string.ascii_letters, *string.digits, *".,:;'-()>\n"]
    # The instruction's words are pieces: letter by letter it is 1,057 tokens before each prompt.
    words = "\n".join(INSTRUCTION.default).replace(" ", " ▁").split(" ")
    merges = [(w[:i], w[i]) for w in words for i in range(1, len(w))]
    joined = [first + second for first, second in merges]
    pieces = list(dict.fromkeys([*special, *letters, *joined]))
    merges = list(dict.fromkeys(merges))
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    config = Gemma2Config(
        vocab_size=len(pieces),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
    )
    return Gemma2Model(config), tokenizer


def sana(wide: bool = False, euler: bool = False) -> SanaPipeline:
    """Of 8 pixels a latent cell, or `wide`: of 16, with query-key norms, a time scale and a learnt
    variance; `euler` for another scheduler than the published ones."""
    width = 24 if wide else 16
    encoder, tokenizer = gemma(width, 3 if wide else 2)
    stages = 5 if wide else 4
    blocks = ["ResBlock"] * (stages - 1) + ["EfficientViTBlock"]
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * stages,
        decoder_block_out_channels=(8,) * stages,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=((),) * (stages - 1) + ((3,),),
        decoder_qkv_multiscales=((),) * (stages - 1) + ((3,),),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=16 if wide else 8,
        num_attention_heads=3 if wide else 2,
        attention_head_dim=8,
        num_layers=3 if wide else 2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12 if wide else 8,
        cross_attention_dim=24 if wide else 16,
        caption_channels=width,
        sample_size=4 if wide else 8,
        qk_norm="rms_norm_across_heads" if wide else None,
        timestep_scale=0.5 if wide else 1.0,
    )
    solver = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else solver,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sana": sana,
    "sana_wide": lambda: sana(wide=True),
    "sana_euler": lambda: sana(euler=True),
}
