"""Wan 2.1 through diffusers: videos, and pictures as videos of one frame (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tiltflow.models.family import Family, Published
from tiltflow.models.pipelines import qwen_vae
from tiltflow.models.pipelines.limits import shown
from tiltflow.models.pipelines.published import T5_XXL
from tiltflow.models.pipelines.qwen_vae import QwenVaeBackbone
from tiltflow.models.pipelines.solvers import UNIPC, check_solver, network_time


def _wan(**transformer: Any) -> dict[str, Any]:
    """The autoencoder's and the transformer's other sizes are their classes' defaults."""
    return {
        "_class_name": "WanPipeline",
        "transformer": {
            "_class_name": "WanTransformer3DModel",
            "text_dim": T5_XXL["d_model"],
            **transformer,
        },
        "vae": {"_class_name": "AutoencoderKLWan"},
        "scheduler": {
            "_class_name": UNIPC,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
        "text_encoder": {**T5_XXL, "_class_name": "UMT5EncoderModel", "vocab_size": 256384},
    }


# diffusers' scripts/convert_wan_to_diffusers.py, and google/umt5-xxl's configuration.
_14B = _wan(num_attention_heads=40, ffn_dim=13824, num_layers=40)
_1_3B = _wan(num_attention_heads=12, ffn_dim=8960, num_layers=30)

FAMILY = Family(
    name="wan",
    backbone="tiltflow.models.families.wan:WanBackbone",
    pipeline="WanPipeline",
    title="Wan 2.1",
    own_vae_dtype=True,
    networks={
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
        "text_encoder": "UMT5EncoderModel",
    },
    schedulers=(UNIPC, "FlowMatchEulerDiscreteScheduler"),
    whole={
        **qwen_vae.WHOLE,
        **dict.fromkeys(("text_dim", "freq_dim", "ffn_dim"), (1, 1_000_000)),
        **dict.fromkeys(("scale_factor_temporal", "scale_factor_spatial"), (1, 64)),
        "rope_max_seq_len": (1, 65_536),
        "decoder_base_dim": (1, 65_536),
    },
    nullable=("patch_size", "decoder_base_dim"),
    depths=qwen_vae.DEPTHS,
    widths=(*qwen_vae.WIDTHS, "text_dim", "freq_dim", "ffn_dim", "decoder_base_dim"),
    lora_targets=r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    input_weight="patch_embedding",
    text_packages=("ftfy",),
    videos=True,
    call={"output_type": "pil"},
    result="[video[0] for video in {call}.frames]",
    published={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(_1_3B, "apache-2.0"),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published(_14B, "apache-2.0"),
    },
)


class WanBackbone(QwenVaeBackbone):
    """A Wan 2.1 text-to-video pipeline; see `PipelineBackbone` for arguments and errors.

    Latents are the autoencoder's, of a video (16, (F − 1)/4 + 1, H/8, W/8) and of a picture, which
    is a video of one frame, without the frames; in fp32 between steps. A prompt has `sequence`
    tokens always; those behind its end are zeros, and the network attends to them.

    The published pipelines sample with UniPC, whose network times are whole numbers (`solvers`).

    Raises:
        ValueError: also if `pipeline` is of Wan 2.2, with two networks or a time a token, if it
            takes a picture beside the prompt, or if prompts are to be read without ftfy.
    """

    default_guidance = 5.0
    default_sequence = 512
    packing = 1
    hands_levels = False

    def _check_parts(self) -> None:
        super()._check_parts()
        for key in ("transformer_2", "boundary_ratio", "expand_timesteps"):
            value = self.pipeline.index.get(key)
            if value not in (None, False, [None, None]):
                raise ValueError(
                    f"{self.path} has {key}={shown(value)} in its model_index.json: it is of "
                    "Wan 2.2, and this family trains Wan 2.1's single network"
                )
        self._check_transformer(self.part_config(self.pipeline, "transformer"))
        self._check_autoencoder(self.part_config(self.pipeline, "vae"))
        check_solver(self.pipeline)

    def _check_transformer(self, config: Mapping[str, Any]) -> None:
        said = f"the transformer in {self.path} has"
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if config[key] is not None:
                raise ValueError(
                    f"{said} {key}={shown(config[key])}: it takes a picture beside the prompt, "
                    "which a WanPipeline does not give it"
                )
        patch, ends = config["patch_size"], (config["out_channels"], config["in_channels"])
        if not isinstance(patch, list | tuple) or list(patch) != [1, 2, 2] or len(set(ends)) != 1:
            raise ValueError(
                f"{said} patch_size={shown(patch)}, out_channels={ends[0]} and in_channels="
                f"{ends[1]}, where patches of [1, 2, 2] go in and come out"
            )
        width = self.pipeline.config("text_encoder").get("d_model")
        if config["text_dim"] != width:
            raise ValueError(
                f"{said} text_dim={config['text_dim']}, but its text encoder has d_model={width}"
            )

    def _check_autoencoder(self, config: Mapping[str, Any]) -> None:
        said = f"the autoencoder in {self.path} has"
        if config["patch_size"] is not None or config["is_residual"]:
            raise ValueError(
                f"{said} patch_size={shown(config['patch_size'])} and "
                f"is_residual={shown(config['is_residual'])}: it is Wan 2.2's"
            )
        made = 2 ** sum(config["temperal_downsample"]), self._factor(config)
        given = config["scale_factor_temporal"], config["scale_factor_spatial"]
        if given != made:
            raise ValueError(
                f"{said} scale_factor_temporal={given[0]} and scale_factor_spatial={given[1]}, "
                f"but its layers make it {made[0]} and {made[1]}"
            )

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["patch_size"][1])

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        return 60  # 480 pixels, the height that the smaller model was made for

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        return int(transformer["rope_max_seq_len"])

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """UMT5's tokens."""
        return {"prompt_embeds": (self.sequence, self.pipe.transformer.config.text_dim)}

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype = self.input_dtype(network)
        video = x if x.ndim == 5 else x.unsqueeze(2)
        v = network(
            video.to(dtype),
            timestep=network_time(sigma),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return v.float().reshape(x.shape)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence,
            device=self.device,
        )
        return {"prompt_embeds": embeds}
