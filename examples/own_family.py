"""A model family of one's own: AuraFlow, a diffusers pipeline that tiltflow does not know.

A directory that `AuraFlowPipeline.save_pretrained` made is then a model like any other:

    tiltflow train RECIPE.yaml model.path=DIR model.family=own_family:FAMILY data.prompts=FILE
    tiltflow sample --model DIR --family own_family:FAMILY --few-step RUN/export/few_step ...

in the folder of this file, or with it on PYTHONPATH. What is said of the pipeline here was read
off diffusers' source, and the test compares images: they are its own to the last bit.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tiltflow.models.family import Family
from tiltflow.models.pipelines.backbone import TIMESTEPS, PipelineBackbone

FAMILY = Family(
    name="aura_flow",
    backbone="own_family:AuraFlowBackbone",
    pipeline="AuraFlowPipeline",
    title="AuraFlow",
    networks={
        "transformer": "AuraFlowTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "UMT5EncoderModel",
    },
    # What no other family's configuration has, so that no file can ask for a million layers.
    whole={"num_mmdit_layers": (0, 1_000), "num_single_dit_layers": (0, 1_000)},
    depths=("num_mmdit_layers", "num_single_dit_layers"),
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
)


class AuraFlowBackbone(PipelineBackbone):
    """Latents are the autoencoder's, (4, side/8, side/8), scaled and not shifted; the network's
    time is σ itself; both passes of guidance run as one batch, the empty prompt first."""

    default_guidance = 3.5
    default_sequence = 256
    packing = 1
    shifted = False

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """T5's tokens; zeros behind the prompt's end."""
        return {"prompt_embeds": (self.sequence, self.pipe.transformer.config.joint_attention_dim)}

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["patch_size"])

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["sample_size"])

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        """The table of positions is a square."""
        return int(transformer["pos_embed_max_size"] ** 0.5)

    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        dtype = self.input_dtype(network)
        return network(
            x.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep=(sigma.float() * TIMESTEPS / TIMESTEPS).to(dtype),  # rounded as the pipeline's
            return_dict=False,
        )[0].float()

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.sequence,
        )
        return {"prompt_embeds": embeds}

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def teacher_sigmas(self, steps: int) -> Tensor:
        """The pipeline's call gives its scheduler a number of steps, and no levels."""
        return self._schedule(self.scheduler, steps, raw=False)
