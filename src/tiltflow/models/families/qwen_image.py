"""Qwen-Image through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.models.family import REPEAT, Family, Published
from tiltflow.models.pipelines import qwen_vae
from tiltflow.models.pipelines.backbone import TIMESTEPS
from tiltflow.models.pipelines.lengths import cut, filled
from tiltflow.models.pipelines.qwen_vae import QWEN_VAE, QwenVaeBackbone

# The transformer's sizes are its class's defaults in diffusers, which were made for this model; the
# scheduler's and the encoder's (Qwen2.5-VL-7B) are the files of the repository.
_QWEN_IMAGE = {
    "_class_name": "QwenImagePipeline",
    "transformer": {"_class_name": "QwenImageTransformer2DModel"},
    "vae": QWEN_VAE,
    "scheduler": {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift": 1.0,
        "shift_terminal": 0.02,
    },
    "text_encoder": {
        "_class_name": "Qwen2_5_VLForConditionalGeneration",
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
    },
}

FAMILY = Family(
    name="qwen_image",
    backbone="tiltflow.models.families.qwen_image:QwenImageBackbone",
    pipeline="QwenImagePipeline",
    title="Qwen-Image",
    own_vae_dtype=True,
    keeps_states=("text_encoder",),
    networks={
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    },
    whole={**qwen_vae.WHOLE, "window_size": (1, 65_536), "fullatt_block_indexes": (0, 1_000)},
    depths=qwen_vae.DEPTHS,
    widths=qwen_vae.WIDTHS,
    token_patch=2,
    input_weight="img_in",
    caution=REPEAT,
    guidance_argument="true_cfg_scale",
    guided_call={"negative_prompt": " "},
    # The teacher's own grid ends at .02: of a few steps the last one would do nothing.
    student_schedule={"shift_terminal": None},
    published={"Qwen/Qwen-Image": Published(_QWEN_IMAGE, "apache-2.0")},
)

POSITIONS = 4096
"""What the transformer has on either side of 0. An image is centred there, text comes after it."""


class QwenImageBackbone(QwenVaeBackbone):
    """A Qwen-Image pipeline; see `PipelineBackbone` for arguments and errors.

    A prompt's embedding has its own length: rows are filled up with zeros to `sequence`, and
    `prompt_lengths`, which stays in main memory, says where each ends.

    **Guidance** is scaled back: each token of the guided velocity to the norm that it has with the
    prompt alone. The negative prompt is a space, as the model's authors have it, since the pipeline
    guides with none at all unless it is given one.
    """

    default_guidance = 4.0
    default_sequence = 512
    longest_sequence = 1024
    packing = 4
    ragged = True

    def _check_parts(self) -> None:
        super()._check_parts()
        config = self.part_config(self.pipeline, "transformer")
        said = f"the transformer in {self.path} has"
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config[key]:
                raise ValueError(f"{said} {key}=true, which is of another model than Qwen-Image")
        patch, out = config["patch_size"], config["out_channels"] or config["in_channels"]
        if patch != 2 or out * 4 != config["in_channels"]:
            raise ValueError(
                f"{said} patch_size={patch}, out_channels={out} and in_channels="
                f"{config['in_channels']}, where 2 × 2 patches go in and come out"
            )

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        return 2 * (POSITIONS - self.longest_sequence)

    def _guide(self, plain: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        only = self._pack(conditional)
        mixed = self._pack(super()._guide(plain, conditional, guidance))
        norms = (torch.norm(each, dim=-1, keepdim=True) for each in (only, mixed))
        return self._unpack(mixed * (next(norms) / next(norms)), *plain.shape[2:])

    def lora_targets(self) -> str:
        """The attention projections of both streams, but for the last block's text query and text
        output: its text is read by nothing, so that these would have no gradient."""
        last = len(self.pipe.transformer.transformer_blocks) - 1
        image, text = r"to_q|to_k|to_v|to_out\.0", "add_q_proj|add_k_proj|add_v_proj|to_add_out"
        unread = rf"(?!{last}\.attn\.(add_q_proj|to_add_out)$)"
        return rf"transformer_blocks\.{unread}\d+\.attn\.({image}|{text})"

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Qwen2.5-VL's tokens and how many of them there are."""
        width = self.pipe.transformer.config.joint_attention_dim
        return {"prompt_embeds": (self.sequence, width), "prompt_lengths": ()}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype, (_, _, height, width) = self.input_dtype(network), x.shape
        embeds, mask = cut(cond)
        v = network(
            hidden_states=self._pack(x).to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            encoder_hidden_states_mask=mask,
            timestep=(sigma.float() * TIMESTEPS).to(dtype) / TIMESTEPS,  # as the pipeline rounds
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return self._unpack(v.float(), height, width)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sequence
        )
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return filled([row[:n] for row, n in zip(embeds, lengths, strict=True)], self.sequence)

    def _encode_negative(self) -> dict[str, Tensor]:
        return self._encode([" "])
