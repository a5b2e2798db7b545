"""Qwen-Image-2.1 through diffusers (METHOD §1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.transfer import to_device
from tiltflow.models.families import qwen_image
from tiltflow.models.family import Family, Published
from tiltflow.models.pipelines import qwen_vae
from tiltflow.models.pipelines.backbone import TIMESTEPS
from tiltflow.models.pipelines.geometry import shift_of
from tiltflow.models.pipelines.lengths import cut, filled
from tiltflow.models.pipelines.limits import shown
from tiltflow.models.pipelines.qwen21 import by_rows, positions_of, validity_of
from tiltflow.models.pipelines.qwen_vae import QwenVaeBackbone

# The transformer's and the autoencoder's sizes are their classes' defaults in diffusers 0.42, which
# were made for this model. The scheduler's are those of its repository at 790c9263, which are
# Qwen-Image's; the encoder's those of Qwen/Qwen3-VL-8B-Instruct.
_QWEN_IMAGE_21 = {
    "_class_name": "QwenImage21Pipeline",
    "transformer": {"_class_name": "QwenImage21Transformer2DModel"},
    "vae": {"_class_name": "AutoencoderKLQwenImage21"},
    "scheduler": qwen_image.FAMILY.published["Qwen/Qwen-Image"].configs["scheduler"],
    "text_encoder": {
        "_class_name": "Qwen3VLForConditionalGeneration",
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}

FAMILY = Family(
    name="qwen_image_21",
    backbone="tiltflow.models.families.qwen_image_21:QwenImage21Backbone",
    pipeline="QwenImage21Pipeline",
    title="Qwen-Image-2.1",
    own_vae_dtype=True,
    keeps_states=("text_encoder",),
    networks={
        "transformer": "QwenImage21Transformer2DModel",
        "vae": "AutoencoderKLQwenImage21",
        "text_encoder": "Qwen3VLForConditionalGeneration",
    },
    required=("text_encoder", "processor"),
    chat_template=True,
    whole={
        **qwen_vae.WHOLE,
        **dict.fromkeys(("mlp_ratio", "scale_factor_temporal", "scale_factor_spatial"), (1, 64)),
        "decoder_base_dim": (1, 65_536),
        "context_in_dim": (1, 1_000_000),
    },
    nullable=("patch_size", "decoder_base_dim"),
    depths=qwen_vae.DEPTHS,
    widths=(*qwen_vae.WIDTHS, "decoder_base_dim", "context_in_dim"),
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    input_weight="img_in",
    caution="Give one prompt a call: in a call with several, the padding of the shorter ones moves "
    "their images (diffusers 0.42.1).",
    guidance_argument="true_cfg_scale",
    guided_call={"negative_prompt": " "},
    takes_length=False,
    # The teacher's own grid ends at .02: of a few steps the last one would do nothing.
    student_schedule={"shift_terminal": None},
    published={
        "Qwen/Qwen-Image-2.1": Published(
            _QWEN_IMAGE_21, "other", "qwen-research-license", "LICENSE"
        ),
    },
)

FACTOR = 16
"""Pixels a latent cell, whatever the autoencoder is: a constant of the pipeline. Sizes are
multiples of two cells, a place of the text encoder's."""


class QwenImage21Backbone(QwenVaeBackbone):
    """A Qwen-Image-2.1 pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (64, side/16, side/16); a token is a cell. It makes red, green,
    blue and opacity; images are the first three, as `convert("RGB")` gives them of the pipeline's.

    A prompt's embedding has its own length: rows are filled up with zeros to `sequence`, and
    `prompt_lengths`, which stays in main memory, says where each ends. The pipeline cuts no prompt,
    so one that is longer is refused. An image is that of its prompt alone (`pipelines.qwen21`); in
    the pipeline's own call a longer prompt beside it moves it.

    **Guidance.** The model is made for a single pass, and by default the teacher takes no more.

    Raises:
        ValueError: also if `pipeline` is a distilled one, with a grid of its own.
    """

    default_guidance = 1.0
    default_sequence = 512
    longest_sequence = 4096
    packing = 1
    ragged = True

    def _check_parts(self) -> None:
        super()._check_parts()
        config, vae = (self.part_config(self.pipeline, part) for part in ("transformer", "vae"))
        grid = self.pipeline.index.get("sample_sigmas")
        if grid is not None:
            raise ValueError(
                f"{self.path} has sample_sigmas={shown(grid)} in its model_index.json: it is "
                "step-distilled, so take Qwen-Image-2.1 itself"
            )
        said = f"the transformer in {self.path} has"
        if config["patch_size"] != 1 or config["out_channels"] not in (None, config["in_channels"]):
            raise ValueError(
                f"{said} patch_size={config['patch_size']}, out_channels={config['out_channels']} "
                f"and in_channels={config['in_channels']}, where a cell goes in and comes out"
            )
        width = self.pipeline.config("text_encoder").get("text_config", {}).get("hidden_size")
        if config["context_in_dim"] != width:
            raise ValueError(
                f"{said} context_in_dim={config['context_in_dim']}, but its text encoder has "
                f"hidden_size={width}"
            )
        if vae["patch_size"] is not None or vae["out_channels"] != 4 or self._factor(vae) != FACTOR:
            raise ValueError(
                f"the autoencoder in {self.path} has patch_size={vae['patch_size']}, out_channels="
                f"{vae['out_channels']} and {len(vae['temperal_downsample'])} halvings, where the "
                f"pipeline needs null, 4 and those of {FACTOR} pixels a cell"
            )

    def _begin(self) -> None:
        if self.parts != "text":
            by_rows(self.transformer)

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return 2

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        return 64

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        return 1024

    def _mu(self, steps: int) -> float:
        return shift_of(self.scheduler.config, 4 * self.geometry.tokens, self.path)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Qwen3-VL's tokens and how many of them there are."""
        width = self.pipe.transformer.config.context_in_dim
        return {"prompt_embeds": (self.sequence, width), "prompt_lengths": ()}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype, lengths = self.input_dtype(network), cond["prompt_lengths"]
        embeds, mask = cut(cond)
        text, (height, width) = embeds.shape[1], x.shape[2:]
        if lengths.is_meta:
            lengths = torch.full(lengths.shape, text, device="cpu")
        with torch.device("cpu"):
            positions = positions_of(lengths, text, height, width)
        v = network(
            x.flatten(2).transpose(1, 2).to(dtype),
            embeds.to(dtype),
            (sigma.float() * TIMESTEPS).to(dtype) / TIMESTEPS,  # as the pipeline rounds
            to_device(positions, x.device),
            validity_of(mask, height * width),
        )
        return v.float().transpose(1, 2).unflatten(2, (height, width))

    def image_places(self, places: Tensor) -> Tensor:
        """A block's places (B, N, C) that are the image's: the prompt's own, filled up to the
        batch's longest, stand before them."""
        return places[:, -math.prod(self.geometry.latent) :]

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, _ = self.pipe.encode_prompt(prompts, device=self.device)
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > self.sequence:
                raise ValueError(
                    f"the prompt {shown(prompt)} has {length} text tokens, which this family does "
                    f"not cut: model.max_sequence_length is {self.sequence}"
                )
        return filled([row[:n] for row, n in zip(embeds, lengths, strict=True)], self.sequence)

    def _to_vae(self, latents: Tensor) -> Tensor:
        """One frame, (B, C, 1, H, W)."""
        mean, std = (
            to_device(torch.tensor(self.vae.config[key]).view(1, -1, 1, 1, 1), latents.device)
            for key in ("latents_mean", "latents_std")
        )
        return latents.unsqueeze(2) * std + mean

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from latents, differentiable, fp32."""
        z = self._to_vae(latents.float()).to(self.vae.dtype)
        images: Tensor = self.vae.decode(z, return_dict=False)[0]
        return self.medium.decode(images[:, :3, 0].float())
