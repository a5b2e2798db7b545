"""A backbone for pictures of another size, over the same networks."""

from __future__ import annotations

import copy

from tiltflow.core.sizes import Resolution, said
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.geometry import geometry_of


def resized(
    backbone: PipelineBackbone, resolution: Resolution, what: str = "the size "
) -> PipelineBackbone:
    """The backbone with the latents and noise levels of another size; networks are shared. `what`
    is the size's name in an error.

    Raises:
        ValueError: if the size does not fit the model, or is of videos where the backbone's is of
            pictures, or the other way round: they are of two media.
    """
    other, config = copy.copy(backbone), dict(backbone.pipe.transformer.config)
    factor, patch, most = other.geometry.factor, other.geometry.patch, other._max_cells(config)
    step = other.geometry.step
    other.geometry = geometry_of(resolution, factor, patch, most, other.path, what, step)
    if (other.geometry.frames > 1) != (backbone.geometry.frames > 1):
        raise ValueError(
            f"{what}{said(resolution)} and {said(backbone.resolution)}: one is of videos and one "
            "of pictures, and both together cannot be made"
        )
    other.resolution = other.geometry.resolution
    other.latent_shape = other._latent_shape(int(config["in_channels"]))
    return other
