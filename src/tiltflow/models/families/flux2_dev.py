"""FLUX.2-dev through diffusers (METHOD §1)."""

from __future__ import annotations

from tiltflow.models.families import flux2
from tiltflow.models.families.flux2 import Flux2Backbone
from tiltflow.models.family import Family, Published

# The transformer's and the autoencoder's sizes are their classes' defaults in diffusers 0.42, which
# were made for this model. The encoder's are Mistral3's defaults in transformers: Mistral Small 3.
_DEV = {
    "_class_name": "Flux2Pipeline",
    "transformer": {"_class_name": "Flux2Transformer2DModel"},
    "vae": {"_class_name": "AutoencoderKLFlux2"},
    "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
    "text_encoder": {"_class_name": "Mistral3ForConditionalGeneration"},
}

FAMILY = Family(
    name="flux2_dev",
    backbone="tiltflow.models.families.flux2_dev:Flux2DevBackbone",
    pipeline="Flux2Pipeline",
    title="FLUX.2-dev",
    keeps_states=("text_encoder",),
    networks={**flux2.FAMILY.networks, "text_encoder": "Mistral3ForConditionalGeneration"},
    chat_template=True,
    whole={
        "image_size": (1, 65_536),
        **dict.fromkeys(("num_channels", "spatial_merge_size"), (1, 64)),
    },
    lora_targets=flux2.FAMILY.lora_targets,
    published={
        "black-forest-labs/FLUX.2-dev": Published(
            _DEV, "other", "flux-dev-non-commercial-license", "LICENSE.md", gated=True
        ),
    },
)


class Flux2DevBackbone(Flux2Backbone):
    """A FLUX.2-dev pipeline; see `PipelineBackbone` for arguments and errors.

    Latents, positions and shift are klein's. The text encoder is Mistral's.

    **Guidance.** The network is guidance-distilled: it takes the guidance scale as an input. So
    every network is given one, in a single pass and never with classifier-free guidance: the number
    that is asked for, 1.0 as well, or where none is, `embedded_guidance`.
    """

    states = (10, 20, 30)

    def _begin(self) -> None:
        super()._begin()
        self.embedded_guidance = self.guidance
