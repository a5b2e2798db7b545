"""FLUX.1 (dev and schnell) through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tiltflow.models.family import Family
from tiltflow.models.pipelines.backbone import TIMESTEPS
from tiltflow.models.pipelines.flux_tokens import FluxTokens
from tiltflow.models.pipelines.published import FLUX

FAMILY = Family(
    name="flux",
    backbone="tiltflow.models.families.flux:FluxBackbone",
    pipeline="FluxPipeline",
    title="FLUX.1",
    networks={
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    },
    required=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    token_patch=2,
    # Attention projections of both streams; single blocks have one stream and no output.
    lora_targets=(
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ),
    published=FLUX,
)  # fmt: skip


class FluxBackbone(FluxTokens):
    """A FLUX.1 pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (16, side/8, side/8), packed 2×2 for the transformer only.

    **Guidance.** FLUX.1-dev is guidance-distilled: its transformer takes the guidance scale as an
    input and cannot do without. So every network is given one, in a single pass and never with
    classifier-free guidance: the number that is asked for, 1.0 as well, or where none is,
    `embedded_guidance`. A transformer without that input (FLUX.1-schnell) has classifier-free
    guidance with the empty prompt, like other families, and 1.0 by default.
    """

    default_guidance = 3.5
    default_sequence = 512

    def _begin(self) -> None:
        super()._begin()
        if self.pipe.transformer.config.guidance_embeds:
            self.embedded_guidance = self.guidance
        else:
            self.guidance = 1.0

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """T5's tokens; CLIP's pooled output."""
        config = self.pipe.transformer.config
        return {
            "prompt_embeds": (self.sequence, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def _forward(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
    ) -> Tensor:
        dtype, (_, _, height, width) = self.input_dtype(network), x.shape
        context = cond["prompt_embeds"].to(dtype)
        level = (sigma.float() * TIMESTEPS).to(dtype) / TIMESTEPS  # rounded as the pipeline does
        v = network(
            hidden_states=self._pack(x).to(dtype),
            encoder_hidden_states=context,
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            timestep=level,
            guidance=cond.get("guidance"),
            txt_ids=torch.zeros(context.shape[1], 3, device=x.device, dtype=dtype),
            img_ids=self._image_ids(height, width).to(dtype),
            return_dict=False,
        )[0]
        return self._unpack(v.float(), height, width)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sequence
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
