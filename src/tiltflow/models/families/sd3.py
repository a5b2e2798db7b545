"""Stable Diffusion 3 and 3.5 through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from tiltflow.models.family import Family
from tiltflow.models.pipelines.backbone import TIMESTEPS, PipelineBackbone
from tiltflow.models.pipelines.fused import fuse_blocks
from tiltflow.models.pipelines.published import SD3

FAMILY = Family(
    name="sd3",
    backbone="tiltflow.models.families.sd3:SD3Backbone",
    pipeline="StableDiffusion3Pipeline",
    title="SD3",
    keeps_states=("text_encoder", "text_encoder_2"),
    networks={
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    required=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    absent_encoders=True,
    # Attention projections of the image and the text stream.
    lora_targets=(
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ),
    no_gradient=("transformer_blocks.{last}.attn.add_q_proj",),  # the text's result ends there
    blocks=("JointTransformerBlock", "FusedBlock"),  # diffusers' own list of them is empty
    graphs=True,
    published=SD3,
)  # fmt: skip


class SD3Backbone(PipelineBackbone):
    """An SD3 pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (16, side/8, side/8); the transformer cuts its own patches.

    Any of the three text encoders may be absent, though not all of them. Its tokens are zeros
    then, and a CLIP's pooled output too. (The pipeline's own call can do without T5 only.)

    Raises:
        ValueError: also if the transformer's pooled input has no room for an absent CLIP's output.
    """

    default_guidance = 7.0
    default_sequence = 256
    packing = 1

    def _begin(self) -> None:
        if any(getattr(self.pipe, name) is not None for name in self.record.text_encoders):
            self._stand_in()

    def _stand_in(self) -> None:
        """Puts a tower of zeros where the pipeline, which calls both CLIPs, has none."""
        pipe, clips = self.pipe, {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
        there = [name for name in clips if getattr(pipe, name) is not None]
        absent = [name for name in clips if name not in there]
        width = pipe.transformer.config.pooled_projection_dim
        width -= sum(getattr(pipe, name).config.projection_dim for name in there)
        if absent and width <= 0:
            raise ValueError(
                f"the pooled_projection_dim of the transformer in {self.path} has no room for "
                f"{absent[0]}, which is absent"
            )
        if there == ["text_encoder_2"]:
            pipe.tokenizer_max_length = pipe.tokenizer_2.model_max_length
        tokenizer = pipe.tokenizer or pipe.tokenizer_2 or pipe.tokenizer_3
        encoders = map(pipe.components.get, self.record.text_encoders)
        dtype = next(encoder.dtype for encoder in encoders if encoder is not None)
        for name in absent:
            setattr(pipe, name, ZeroTower(width, dtype))
            setattr(pipe, clips[name], tokenizer)  # the pipeline counts tokens, and no more
            width = 0  # of two absent CLIPs, one stands for both

    def _shortest_sequence(self) -> int:
        """Where T5 is absent its tokens are zeros, and may be none."""
        return 0 if "text_encoder_3" in self.pipeline.absent else 1

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
        dtype = self.input_dtype(network)
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
        return self._schedule(self.scheduler, steps, raw=False)

    def fuse(self, mixed: bool = False) -> int:
        return fuse_blocks(self.transformer, mixed)


class ZeroTower(nn.Module):
    """An absent CLIP, called as the pipeline calls one: `width` zeros a token and for the whole."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, input_ids: Tensor, output_hidden_states: bool = True) -> CLIPTextModelOutput:
        """Of `input_ids` (B, L): `text_embeds` (B, width), `hidden_states` (B, L, width)."""
        tokens = torch.zeros(
            *input_ids.shape, self.width, dtype=self.dtype, device=input_ids.device
        )
        return CLIPTextModelOutput(text_embeds=tokens[:, 0], hidden_states=(tokens, tokens))
