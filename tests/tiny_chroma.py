"""Tiny random Chroma pipelines, as those of `tiny_pipelines`."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)


def chroma(wide: bool = False, beta: bool = False) -> ChromaPipeline:
    """With a shift by resolution, or `beta` spacing and none."""
    from tiny_pipelines import autoencoder, t5  # which takes builders from here

    encoder, tokenizer = t5(48 if wide else 32)
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=3 if wide else 2,
        num_single_layers=3 if wide else 2,
        attention_head_dim=24 if wide else 16,
        num_attention_heads=3 if wide else 2,
        joint_attention_dim=48 if wide else 32,
        axes_dims_rope=(8, 8, 8) if wide else (4, 6, 6),
        approximator_num_channels=32 if wide else 16,
        approximator_hidden_dim=24 if wide else 32,
        approximator_layers=2 if wide else 1,
    )
    spacing = {"use_beta_sigmas": True} if beta else {"shift": 3.0, "use_dynamic_shifting": True}
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**spacing),
        vae=autoencoder(0.3611, 0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "chroma": chroma,
    "chroma_wide": lambda: chroma(wide=True),
    "chroma_beta": lambda: chroma(beta=True),
}
