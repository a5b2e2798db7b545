"""The configurations of the published pipelines, for looking before downloading.

Facts of the repositories' own files (`transformer/config.json` and so on) under the ids below;
what a class's defaults say already is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltflow.models.family import Published

_CLIP_L = {
    "_class_name": "CLIPTextModelWithProjection",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "_class_name": "T5EncoderModel",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
QWEN3_4B = {
    "_class_name": "Qwen3ForCausalLM",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN3_8B = QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


def _vae(scaling: float, shift: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


FLUX_VAE = _vae(0.3611, 0.1159)


def _sd3(**transformer: Any) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            **transformer,
        },
        "vae": _vae(1.5305, 0.0609),
        "scheduler": {"shift": 3.0},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": T5_XXL,
    }


def _klein(
    layers: int, single: int, heads: int, encoder: Mapping[str, Any], distilled: bool
) -> dict[str, Any]:
    return {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": distilled,
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "in_channels": 128,
            "num_layers": layers,
            "num_single_layers": single,
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * encoder["hidden_size"],
            "axes_dims_rope": [32, 32, 32, 32],
            "guidance_embeds": False,
        },
        "vae": {"_class_name": "AutoencoderKLFlux2"},
        "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
        "text_encoder": dict(encoder),
    }


_SD35 = _sd3(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13)))
# diffusers' scripts/convert_sd3_to_diffusers.py at 3ab805a: heads are as many as layers, and 192
# positions a side, as in SD3. That there are 38 layers is not in it: `tests/test_published.py` has
# the number of parameters that they come to, 8.06 billion, which Stability AI gives as 8.1.
_SD35L = _sd3(
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=38 * 64,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)
_FLUX_DEV = {
    "_class_name": "FluxPipeline",
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "vae": FLUX_VAE,
    "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
    "text_encoder": _CLIP_L | {"_class_name": "CLIPTextModel"},
    "text_encoder_2": T5_XXL,
}

_COMMUNITY = ("other", "stabilityai-ai-community", "LICENSE.md")
_KLEIN_9B = ("other", "flux-non-commercial-license", "LICENSE.md")

SD3 = {
    "stabilityai/stable-diffusion-3-medium-diffusers": Published(
        _sd3(pos_embed_max_size=192), *_COMMUNITY, gated=True
    ),
    "stabilityai/stable-diffusion-3.5-medium": Published(_SD35, *_COMMUNITY, gated=True),
    "stabilityai/stable-diffusion-3.5-large": Published(_SD35L, *_COMMUNITY, gated=True),
}
FLUX = {
    "black-forest-labs/FLUX.1-dev": Published(
        _FLUX_DEV, "other", "flux-1-dev-non-commercial-license", "LICENSE.md", gated=True
    ),
}
KLEIN = {
    "black-forest-labs/FLUX.2-klein-base-4B": Published(
        _klein(5, 20, 24, QWEN3_4B, False), "apache-2.0"
    ),
    "black-forest-labs/FLUX.2-klein-4B": Published(_klein(5, 20, 24, QWEN3_4B, True), "apache-2.0"),
    "black-forest-labs/FLUX.2-klein-base-9B": Published(
        _klein(8, 24, 32, _QWEN3_8B, False), *_KLEIN_9B, gated=True
    ),
    "black-forest-labs/FLUX.2-klein-9B": Published(
        _klein(8, 24, 32, _QWEN3_8B, True), *_KLEIN_9B, gated=True
    ),
}
"""Pipelines by hub id: their class, each part's configuration with its class, their licence."""
