"""SANA through diffusers (METHOD §1)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiltflow.models.family import REPEAT, Family, Published
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.solvers import DPM, check_solver, network_time

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
"""What the pipeline puts before a prompt, but not before the negative one."""

_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_SCALES = [[], [], [], [5], [5], [5]]
_1600M = {
    "_class_name": "SanaPipeline",
    "transformer": {"_class_name": "SanaTransformer2DModel"},
    "vae": {
        "_class_name": "AutoencoderDC",
        "encoder_block_types": _BLOCKS,
        "decoder_block_types": _BLOCKS,
        "encoder_qkv_multiscales": _SCALES,
        "decoder_qkv_multiscales": _SCALES,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    "scheduler": {
        "_class_name": DPM,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 3.0,
    },
    "text_encoder": {
        "_class_name": "Gemma2Model",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
}
"""diffusers' scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py; of the
transformer they are its class's defaults. The text encoder is Gemma 2 2B."""

FAMILY = Family(
    name="sana",
    backbone="tiltflow.models.families.sana:SanaBackbone",
    pipeline="SanaPipeline",
    title="SANA",
    own_vae_dtype=True,
    networks={
        "transformer": "SanaTransformer2DModel",
        "vae": "AutoencoderDC",
        "text_encoder": "Gemma2Model",
    },
    schedulers=(DPM, "FlowMatchEulerDiscreteScheduler"),
    whole={
        "num_cross_attention_heads": (1, 4_096),
        "cross_attention_head_dim": (1, 65_536),
        **dict.fromkeys(("cross_attention_dim", "caption_channels"), (1, 1_000_000)),
        "encoder_block_out_channels": (1, 65_536),
        **dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (0, 100)),
        "query_pre_attn_scalar": (1, 65_536),
        "sliding_window": (1, 10_000_000),
    },
    widths=("cross_attention_dim", "caption_channels", "encoder_block_out_channels"),
    # Both attentions; the feed-forward part is convolutions.
    lora_targets=r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    input_weight="caption_projection.linear_1",
    blocks=("SanaTransformerBlock",),  # diffusers has no list of them
    caution=REPEAT,
    call={"use_resolution_binning": False},  # which draws at one of a table's sizes and shrinks
    published={
        # Its card has no licence field; its text says "NSCL v2-custom", with LICENSE.txt, and
        # that Gemma's terms hold for the text encoder.
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Published(
            _1600M, "other", "nscl-v2-custom", "LICENSE.txt"
        ),
    },
)


class SanaBackbone(PipelineBackbone):
    """A SANA pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (32, side/32, side/32), in fp32 between steps.

    The published pipelines sample with DPM-Solver++, whose network times are whole numbers: a
    velocity at such a time t is asked for with σ = t/1000 in fp64. Students have Euler's levels
    with the solver's `flow_shift`, and real times.

    Raises:
        ValueError: also if the solver is not set to flow matching, or the transformer takes a
            guidance scale, which only SANA-Sprint's pipeline gives.
    """

    default_guidance = 4.5
    default_sequence = 300
    packing = 1
    shifted = False
    hands_levels = False

    def _check_parts(self) -> None:
        if self.part_config(self.pipeline, "transformer")["guidance_embeds"]:
            raise ValueError(
                f"the transformer in {self.path} takes a guidance scale as an input "
                "(guidance_embeds), which a SanaPipeline does not give it"
            )
        check_solver(self.pipeline)

    def _factor(self, vae: Mapping[str, Any]) -> int:
        return int(2 ** (len(vae["encoder_block_out_channels"]) - 1))

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["patch_size"])

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["sample_size"])

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Gemma's tokens, and 1 for each that is one or 0 for padding."""
        width = self.pipe.transformer.config.caption_channels
        return {"prompt_embeds": (self.sequence, width), "prompt_mask": (self.sequence,)}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype, time = self.input_dtype(network), network_time(sigma)
        v = network(
            x.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["prompt_mask"],
            timestep=time * self.pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return v.float()[:, : x.shape[1]]  # the rest, where there is one, is a learnt variance

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._embedded(prompts, INSTRUCTION.default)

    negatives_are_prompts = False  # see `data.embeddings.check_negatives`

    def _encode_negative(self) -> dict[str, Tensor]:
        return self._embedded([""], None)

    def _embedded(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.sequence,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask.to(embeds.dtype)}

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents.to(self.vae.dtype) / self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """As ever; without gradient the autoencoder's weights are marked as the pipeline's are (see
        `thaw`), because its attention multiplies tensors whose rounding that decides."""
        frozen = not torch.is_grad_enabled() and not next(self.vae.parameters()).requires_grad
        if not frozen:
            return super().decode(latents)
        self.vae.requires_grad_(True)
        try:
            return super().decode(latents)
        finally:
            self.vae.requires_grad_(False)

    def checkpoint_decoder(self) -> None:
        """By its blocks' parts, one by one: diffusers has no checkpointing for this autoencoder."""
        for stage in self.vae.decoder.up_blocks:
            for part in stage:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)
