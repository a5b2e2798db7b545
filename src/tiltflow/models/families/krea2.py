"""Krea 2, Raw and Turbo, through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tiltflow.core.transfer import to_device
from tiltflow.models.family import Family, Published
from tiltflow.models.pipelines import qwen_vae
from tiltflow.models.pipelines.backbone import TIMESTEPS
from tiltflow.models.pipelines.limits import is_whole, shown
from tiltflow.models.pipelines.qwen_vae import QWEN3_VL_4B, QWEN_VAE, QwenVaeBackbone

TAPS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""The text encoder's hidden states that a prompt is, unless the pipeline's index names others."""
SUFFIX = 5
"""Tokens of the template behind a prompt, which count towards its length."""
DISTILLED_MU = 1.15
"""The shift of every picture size, where the pipeline is the distilled one."""


def _published(distilled: bool) -> Published:
    """The transformer's sizes are its class's defaults in diffusers 0.42, which were made for this
    model; scheduler and text encoder are those that its pipeline's documentation names."""
    configs = {
        "_class_name": "Krea2Pipeline",
        "is_distilled": distilled,
        "transformer": {"_class_name": "Krea2Transformer2DModel"},
        "vae": QWEN_VAE,
        "scheduler": {
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 6400,
        },
        "text_encoder": QWEN3_VL_4B,
    }
    return Published(configs, "other", "krea-2-community-license", "LICENSE.pdf", gated=True)


FAMILY = Family(
    name="krea2",
    backbone="tiltflow.models.families.krea2:Krea2Backbone",
    pipeline="Krea2Pipeline",
    title="Krea 2",
    own_vae_dtype=True,
    keeps_states=("text_encoder",),
    networks={
        "transformer": "Krea2Transformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": ("Qwen3VLModel", "Qwen3VLForConditionalGeneration"),
    },
    whole={
        **qwen_vae.WHOLE,
        **dict.fromkeys(("text_hidden_dim", "text_intermediate_size"), (1, 1_000_000)),
        **dict.fromkeys(("text_num_attention_heads", "text_num_key_value_heads"), (1, 4_096)),
        **dict.fromkeys(("num_layerwise_text_blocks", "num_refiner_text_blocks"), (0, 1_000)),
        "num_text_layers": (1, 1_000),
        "timestep_embed_dim": (2, 65_536),
    },
    depths=(*qwen_vae.DEPTHS, "num_layerwise_text_blocks", "num_refiner_text_blocks"),
    widths=(
        *qwen_vae.WIDTHS,
        "text_hidden_dim",
        "text_intermediate_size",
        "num_text_layers",
        "timestep_embed_dim",
    ),
    token_patch=2,
    # The attention's output gate is a projection too. The text fusion has modules of these names.
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)",
    input_weight="img_in",
    twin=("in_channels", "text_hidden_dim", "num_text_layers"),
    twin_index={"text_encoder_select_layers": list(TAPS), "patch_size": 2},
    guidance_offset=1.0,  # the pipeline's scale g is in c + g · (c − u), and 0 is a pass without
    published={"krea/Krea-2-Raw": _published(False), "krea/Krea-2-Turbo": _published(True)},
)


class Krea2Backbone(QwenVaeBackbone):
    """A Krea 2 pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are packed into square patches, whose side is in the pipeline's index. A prompt is the
    states of several layers of its text encoder, token by token.

    **Guidance** s (1 is a pass without) is the pipeline's `guidance_scale` plus one.

    `generator` is Turbo where `pipeline` is Raw. Turbo's shift is alike at every size: a student's
    grid is by the pipeline that it is sampled in, which is the generator's.

    Raises:
        ValueError: also if `pipeline` is the distilled one of the two.
    """

    default_guidance = 5.5
    default_sequence = 512

    def _part_configs(self, pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        index = self.pipeline.index if pipe is None else pipe.config
        self.packing = int(index.get("patch_size", 2)) ** 2
        return super()._part_configs(pipe)

    def _check_parts(self) -> None:
        super()._check_parts()
        config = self.part_config(self.pipeline, "transformer")
        encoder = self.pipeline.config("text_encoder").get("text_config", {})
        layers, width = encoder.get("num_hidden_layers", 0), encoder.get("hidden_size", 0)
        taps = self.pipeline.index.get("text_encoder_select_layers") or TAPS
        listed = isinstance(taps, list | tuple) and all(
            is_whole(tap) and 0 <= tap <= layers for tap in taps
        )
        if not listed or len(taps) != config["num_text_layers"]:
            raise ValueError(
                f"{self.path} has text_encoder_select_layers={shown(taps)}, which are not "
                f"{config['num_text_layers']} (num_text_layers of its transformer) of the states "
                f"0 to {layers} of its text encoder"
            )
        said = f"the transformer in {self.path} has"
        if config["text_hidden_dim"] != width:
            raise ValueError(
                f"{said} text_hidden_dim={config['text_hidden_dim']}, but its text encoder has "
                f"hidden_size={width}"
            )
        for heads in ("num_attention_heads", "text_num_attention_heads"):
            shared = heads.replace("attention", "key_value")
            if config[heads] % config[shared]:
                raise ValueError(
                    f"{said} {heads}={config[heads]}, no multiple of {shared}={config[shared]}"
                )
        if config["timestep_embed_dim"] % 2:
            raise ValueError(
                f"{said} timestep_embed_dim={config['timestep_embed_dim']}, which is odd"
            )

    def _check_teacher(self) -> None:
        if self.pipeline.index.get("is_distilled"):
            raise ValueError(
                f"the teacher in {self.path} is step-distilled: with model.generator_path set, "
                "model.path must be Krea 2 Raw"
            )

    def _begin(self) -> None:
        self._positions: dict[tuple[int, int, int], Tensor] = {}
        if self.pipe.config.is_distilled:
            self.guidance = 1.0

    def _shortest_sequence(self) -> int:
        return SUFFIX + 1

    def _mu(self, steps: int) -> float:
        return DISTILLED_MU if self.pipe.config.is_distilled else super()._mu(steps)

    def _student_mu(self, steps: int) -> float:
        config = self.generator_config or self.pipe.config
        return DISTILLED_MU if config.get("is_distilled") else super()._mu(steps)

    def _guide(self, plain: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        return conditional + (guidance - 1) * (conditional - plain)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """States of several layers a token, and which tokens are the prompt's or the template's."""
        config = self.pipe.transformer.config
        states = (self.sequence, config.num_text_layers, config.text_hidden_dim)
        return {"prompt_embeds": states, "prompt_mask": (self.sequence,)}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype, embeds = self.input_dtype(network), cond["prompt_embeds"]
        v = network(
            hidden_states=self._pack(x).to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            timestep=(sigma.float() * TIMESTEPS / TIMESTEPS).to(dtype),  # as the pipeline rounds
            position_ids=self._ids(embeds.shape[1], *x.shape[2:]),
            encoder_attention_mask=cond["prompt_mask"].bool(),
            return_dict=False,
        )[0]
        return self._unpack(v.float(), *x.shape[2:])

    def _ids(self, tokens: int, height: int, width: int) -> Tensor:
        """Positions (tokens + H/p · W/p, 3) of text and image, kept on the device."""
        p = self.geometry.patch
        key = (tokens, height // p, width // p)
        if key not in self._positions:
            ids = self.pipe.prepare_position_ids(*key, device="cpu")
            self._positions[key] = to_device(ids, self.device)
        return self._positions[key]

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sequence
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask}
