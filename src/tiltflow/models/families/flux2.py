"""FLUX.2-klein, distilled and base, through diffusers (METHOD §1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from tiltflow.core.transfer import to_device
from tiltflow.models.backbone import Conditioning
from tiltflow.models.family import Family
from tiltflow.models.pipelines.backbone import TIMESTEPS, PipelineBackbone
from tiltflow.models.pipelines.published import KLEIN

# A regular expression, because `to_out` is a module in single blocks but a list in double ones, so
# that no list of name endings fits both. The single blocks' query, key, value and MLP are one
# matrix.
_IMAGE, _TEXT = r"to_q|to_k|to_v|to_out\.0", "add_q_proj|add_k_proj|add_v_proj|to_add_out"
_DOUBLE = rf"transformer_blocks\.\d+\.attn\.({_IMAGE}|{_TEXT})"

FAMILY = Family(
    name="flux2",
    backbone="tiltflow.models.families.flux2:Flux2Backbone",
    pipeline="Flux2KleinPipeline",
    title="klein",
    keeps_states=("text_encoder",),
    networks={
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
    },
    chat_template=True,
    lora_targets=rf"({_DOUBLE}|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))",
    twin=("in_channels", "out_channels", "joint_attention_dim"),
    published=KLEIN,
)


class Flux2Backbone(PipelineBackbone):
    """A FLUX.2-klein pipeline; see `PipelineBackbone` for the other arguments and errors.

    Latents are patchified and normalised by the autoencoder's batch-norm statistics, as the
    pipeline's own noise is: (128, side/16, side/16). Guidance is classifier-free, and only for
    klein-base; the distilled klein takes none.

    `generator` is the distilled klein where `pipeline` is klein-base.

    Raises:
        ValueError: also if `generator` is no FLUX.2-klein of the same size, or `pipeline` is the
            distilled one of the two.
    """

    states: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Hidden states of the text encoder that the pipeline's call puts side by side as a prompt's
    embedding."""
    default_guidance = 4.0
    default_sequence = 512
    axes = 4
    packing = 4

    def _begin(self) -> None:
        self.step_distilled = bool(self.pipe.config.get("is_distilled"))
        if self.step_distilled:
            self.guidance = 1.0
        if self.parts != "text" and not self.vae.bn.running_var.is_meta:
            self._check_variance()
        self._positions: dict[tuple[int, ...], Tensor] = {}

    def _check_variance(self) -> None:
        lowest = float(self.vae.bn.running_var.min()) + self.vae.config.batch_norm_eps
        if lowest <= 0:
            raise ValueError(
                f"the autoencoder in {self.path} has a variance of {lowest:g} in bn.running_var, "
                "which it divides by the root of"
            )

    def _check_parts(self) -> None:
        config = self.pipeline.config("text_encoder")
        config = config.get("text_config", config)
        layers = config.get("num_hidden_layers", 0)
        if layers < self.states[-1]:
            raise ValueError(
                f"the text encoder in {self.path} has {layers} layers, but {self.record.title} is "
                f"conditioned on the hidden states {', '.join(map(str, self.states))}"
            )
        width = self.part_config(self.pipeline, "transformer")["joint_attention_dim"]
        hidden = config.get("hidden_size", 0)
        if width != len(self.states) * hidden:
            raise ValueError(
                f"the transformer in {self.path} has joint_attention_dim={width}, which is not "
                f"{len(self.states)} × hidden_size={hidden} of its text encoder"
            )

    def _check_teacher(self) -> None:
        if self.pipeline.index.get("is_distilled"):
            raise ValueError(
                f"the teacher in {self.path} is step-distilled: with model.generator_path set, "
                "model.path must be klein-base"
            )

    def _latent_shape(self, channels: int) -> tuple[int, ...]:
        return (channels, *self.geometry.grid)

    def _mu(self, steps: int) -> float:
        return compute_empirical_mu(image_seq_len=self.geometry.tokens, num_steps=steps)

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """v(x, σ), fp32 (B, C, H, W), with classifier-free guidance unless `guidance` is 1 or
        None.

        Raises:
            ValueError: if guidance is asked of a pipeline that is step-distilled.
        """
        if self.step_distilled and guidance not in (None, 1.0):
            raise ValueError(
                f"the model in {self.path} is step-distilled and takes guidance 1, not {guidance}: "
                "give klein-base as model.path and this one as model.generator_path"
            )
        return super().velocity(network, x, sigma, cond, guidance)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The text encoder's tokens, three of its hidden states side by side."""
        return {"prompt_embeds": (self.sequence, self.pipe.transformer.config.joint_attention_dim)}

    def _forward(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
    ) -> Tensor:
        dtype, context = self.input_dtype(network), cond["prompt_embeds"]
        level = (sigma.float() * TIMESTEPS).to(dtype) / TIMESTEPS  # rounded as the pipeline does
        v = network(
            hidden_states=self.pipe._pack_latents(x).to(dtype),
            encoder_hidden_states=context.to(dtype),
            timestep=level,
            guidance=cond.get("guidance"),
            txt_ids=self._text_ids(context),
            img_ids=self._image_ids(x),
            return_dict=False,
        )[0]
        return self._unpack(v.float(), x.shape[2], x.shape[3])

    def _text_ids(self, context: Tensor) -> Tensor:
        """Positions (1, L, 4) of the text tokens, kept on the device."""
        key = (context.shape[1],)
        if key not in self._positions:
            self._positions[key] = to_device(self.pipe._prepare_text_ids(context[:1]), self.device)
        return self._positions[key]

    def _image_ids(self, x: Tensor) -> Tensor:
        """Positions (1, H · W, 4) of the image tokens, kept on the device."""
        key = tuple(x.shape[2:])
        if key not in self._positions:
            self._positions[key] = to_device(self.pipe._prepare_latent_ids(x[:1]), self.device)
        return self._positions[key]

    @staticmethod
    def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, H · W, C) as (B, C, H, W): the inverse of the pipeline's packing."""
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sequence
        )
        return {"prompt_embeds": embeds}

    def _to_vae(self, latents: Tensor) -> Tensor:
        norm = self.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).float()
        variance = norm.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps
        return self.pipe._unpatchify_latents(latents * variance.sqrt().float() + mean)
