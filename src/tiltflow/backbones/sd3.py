"""Stable Diffusion 3 and 3.5 through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from tiltflow.backbones.pipeline import TIMESTEPS, PipelineBackbone, input_dtype


class SD3Backbone(PipelineBackbone):
    """An SD3 pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (16, side/8, side/8); the transformer cuts its own patches. The
    T5 tower may be absent: its `max_sequence_length` tokens are zeros then.
    """

    family = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    vae_class = AutoencoderKL
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    default_guidance = 7.0
    default_sequence = 256
    packing = 1

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["patch_size"])

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["sample_size"])

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        return int(transformer["pos_embed_max_size"])

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """CLIP's tokens and then T5's; both CLIPs' pooled outputs."""
        config = self.pipe.transformer.config
        tokens = self.pipe.tokenizer_max_length + self.sequence
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype = input_dtype(network)
        return network(
            hidden_states=x.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            timestep=sigma.float() * TIMESTEPS,
            return_dict=False,
        )[0].float()

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def teacher_sigmas(self, steps: int) -> Tensor:
        """The grid of the pipeline's own call: the scheduler's, which is not the few-step one."""
        return self._schedule(steps, raw=False)

    def lora_targets(self) -> str | list[str]:
        """Attention projections of the image and the text stream."""
        image = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        text = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
        return image + text
