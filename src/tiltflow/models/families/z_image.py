"""Z-Image and Z-Image-Turbo through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor, nn

from tiltflow.flow import raw_levels
from tiltflow.models.family import Family, Published
from tiltflow.models.pipelines.backbone import TIMESTEPS, PipelineBackbone
from tiltflow.models.pipelines.geometry import odd
from tiltflow.models.pipelines.lengths import filled
from tiltflow.models.pipelines.published import FLUX_VAE, QWEN3_4B

MULTIPLE = 32
"""The network pads each text, and each image, to a multiple of so many tokens."""


def _published(shift: float) -> Published:
    """The transformer's sizes are its class's defaults in diffusers 0.42, which were made for this
    model. The text encoder's are those of modelscope/DiffSynth-Studio (Apache-2.0),
    diffsynth/models/z_image_text_encoder.py: Qwen3-4B. The shifts are those of the repositories'
    scheduler_config.json as other programs cite them; a run reads its own directory's."""
    return Published(
        {
            "_class_name": "ZImagePipeline",
            "transformer": {"_class_name": "ZImageTransformer2DModel"},
            "vae": FLUX_VAE,
            "scheduler": {"shift": shift},
            "text_encoder": QWEN3_4B | {"_class_name": "Qwen3Model"},
        },
        "apache-2.0",
    )


FAMILY = Family(
    name="z_image",
    backbone="tiltflow.models.families.z_image:ZImageBackbone",
    pipeline="ZImagePipeline",
    title="Z-Image",
    own_vae_dtype=True,
    keeps_states=("text_encoder",),
    networks={
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    },
    chat_template=True,
    whole={
        **dict.fromkeys(("all_patch_size", "all_f_patch_size"), (1, 64)),
        **dict.fromkeys(("n_layers", "n_heads", "n_kv_heads"), (1, 1_000)),
        **dict.fromkeys(("dim", "cap_feat_dim"), (1, 1_000_000)),
        **dict.fromkeys(("axes_dims", "axes_lens"), (1, 65_536)),
        "n_refiner_layers": (0, 1_000),
    },
    depths=("n_layers", "n_refiner_layers"),
    widths=("dim", "cap_feat_dim"),
    lora_targets=r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
    input_weight="cap_embedder.1",
    twin=("in_channels", "cap_feat_dim"),
    guidance_offset=1.0,  # the pipeline's scale g is in c + g · (c − u), and 0 is a pass without
    published={
        "Tongyi-MAI/Z-Image": _published(shift=6.0),
        "Tongyi-MAI/Z-Image-Turbo": _published(shift=3.0),
    },
)


class ZImageBackbone(PipelineBackbone):
    """A Z-Image pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, (16, side/8, side/8), in fp32 between steps. The network's time
    is 0 at noise and 1 at data, and its output is data − noise, so it is negated here.

    A prompt's embedding has its own length: rows are filled up with zeros to `sequence`, and
    `prompt_lengths`, which stays in main memory, says where each ends.

    **Guidance** s (1 is a pass without) is the pipeline's `guidance_scale` plus one.
    """

    default_guidance = 6.0
    default_sequence = 512
    packing = 1
    prompts_first = True

    def _check_parts(self) -> None:
        config = self.part_config(self.pipeline, "transformer")
        axes, heads = config["axes_dims"], config["n_heads"]
        if len(axes) != 3 or sum(axes) * heads != config["dim"] or odd(axes):
            raise ValueError(
                f"the transformer in {self.path} has axes_dims={axes}, which are not 3 even "
                f"numbers that add up to its dim={config['dim']} over its n_heads={heads}"
            )

    def _begin(self) -> None:
        padded = -(-self.sequence // MULTIPLE) * MULTIPLE
        most = int(self.pipe.transformer.config.axes_lens[0]) - 2
        if padded > most:
            filled_up = f", filled up to {padded}," if padded > self.sequence else ""
            raise ValueError(
                f"model.max_sequence_length={self.sequence}{filled_up} is more than the {most} "
                f"positions that the transformer in {self.path} has for text (axes_lens)"
            )

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        return int(min(transformer["axes_lens"][1:]))

    def _raw_levels(self, steps: int) -> list[float]:
        """Rounded to fp32 before the scheduler sees them, as the pipeline's own are."""
        return get_default_z_image_sigmas(len(raw_levels(steps)))

    def _guide(self, plain: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        return conditional + (guidance - 1) * (conditional - plain)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Qwen3's tokens and how many of them there are."""
        width = self.pipe.transformer.config.cap_feat_dim
        return {"prompt_embeds": (self.sequence, width), "prompt_lengths": ()}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype, lengths = self.input_dtype(network), cond["prompt_lengths"]
        prompts = list(cond["prompt_embeds"].to(dtype).unbind())
        if not lengths.is_meta:  # in shape only, all of them are as long as they can be
            prompts = [row[:n] for row, n in zip(prompts, lengths.tolist(), strict=True)]
        velocities = network(
            list(x.to(dtype).unsqueeze(2).unbind()),
            (TIMESTEPS - sigma.float() * TIMESTEPS) / TIMESTEPS,
            prompts,
            return_dict=False,
        )[0]
        return -torch.stack([v.float() for v in velocities]).squeeze(2)

    def image_places(self, places: Tensor) -> Tensor:
        """A block's places (B, N, C) that are the image's: the prompt's own follow them, and then
        filling up to the batch's longest."""
        return places[:, : self.geometry.tokens]

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompts` are overwritten, which is the pipeline's doing."""
        found, _ = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence,
        )
        return filled(found, self.sequence)

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
