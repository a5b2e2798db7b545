"""Chroma through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.models.family import Family, Published
from tiltflow.models.pipelines.backbone import TIMESTEPS
from tiltflow.models.pipelines.flux_tokens import FluxTokens
from tiltflow.models.pipelines.published import FLUX_VAE, T5_XXL

# The transformer's sizes are its class's defaults in diffusers, which were made for this model. A
# shift of 3 at every size is what others report of Chroma1-HD's file, and is not verified here: a
# plan of memory does not depend on it, and a run reads the checkpoint's.
_CHROMA = {
    "_class_name": "ChromaPipeline",
    "transformer": {"_class_name": "ChromaTransformer2DModel"},
    "vae": FLUX_VAE,
    "scheduler": {"shift": 3.0},
    "text_encoder": T5_XXL,
}

FAMILY = Family(
    name="chroma",
    backbone="tiltflow.models.families.chroma:ChromaBackbone",
    pipeline="ChromaPipeline",
    title="Chroma",
    networks={
        "transformer": "ChromaTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "T5EncoderModel",
    },
    whole={
        "approximator_num_channels": (4, 65_536),
        "approximator_hidden_dim": (1, 1_000_000),
        "approximator_layers": (0, 1_000),
    },
    depths=("approximator_layers",),
    widths=("approximator_num_channels", "approximator_hidden_dim"),
    token_patch=2,
    # Attention projections of both streams; single blocks have one stream and no output.
    lora_targets=(
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ),
    published={"lodestones/Chroma1-HD": Published(_CHROMA, "apache-2.0")},
)  # fmt: skip


class ChromaBackbone(FluxTokens):
    """A Chroma pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (16, side/8, side/8), packed 2×2 for the transformer only.

    The mask is 1 for a prompt's tokens, one token of padding and the image, and 0 elsewhere. It is
    added to the attention's scores where both ends are 1, so it hides nothing; so was the published
    network trained.
    """

    default_guidance = 5.0
    default_sequence = 512

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """T5's tokens and their mask."""
        width = self.pipe.transformer.config.joint_attention_dim
        return {"prompt_embeds": (self.sequence, width), "prompt_mask": (self.sequence,)}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype, (_, _, height, width) = self.input_dtype(network), x.shape
        tokens, context = self._pack(x).to(dtype), cond["prompt_embeds"].to(dtype)
        mask = cond["prompt_mask"].to(dtype)
        mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        with _mask_for_single_blocks(network, mask):
            v = network(
                hidden_states=tokens,
                encoder_hidden_states=context,
                timestep=(sigma.float() * TIMESTEPS).to(dtype) / TIMESTEPS,  # the pipeline's round
                txt_ids=torch.zeros(context.shape[1], 3, device=x.device, dtype=dtype),
                img_ids=self._image_ids(height, width).to(dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return self._unpack(v.float(), height, width)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence,
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask}


@contextmanager
def _mask_for_single_blocks(network: Any, mask: Tensor) -> Iterator[None]:
    """Has checkpointed single-stream blocks get the mask, which diffusers leaves out (0.42.1): the
    forward pass would be another model's."""
    if not network.gradient_checkpointing:
        yield
        return
    own = network._gradient_checkpointing_func

    def call(block: Callable[..., Any], *given: Any) -> Any:
        without = len(given) == 3  # hidden states, modulation and positions
        return own(block, *given, *([mask] if without else []))

    network._gradient_checkpointing_func = call
    try:
        yield
    finally:
        network._gradient_checkpointing_func = own
