"""Model families: each makes its networks velocities behind one protocol, `base.Backbone`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiltflow.models.backbone import Backbone, Base, Parts
from tiltflow.models.pipelines.files import check_pipeline, local_pipeline

__all__ = ["check_pipeline", "load_backbone", "local_pipeline"]


def load_backbone(
    path: str | Path | None,
    *,
    family: str | None = None,
    generator_path: str | Path | None = None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    resolution: int | None = None,
    max_sequence_length: int | None = None,
    parts: Parts = "all",
    fp8: bool = False,
    base: Base = "device",
) -> Backbone:
    """The backbone of a pipeline directory, or the mixture (which reads no path).

    Args:
        family: "sd3", "flux", "flux2" or "mixture"; None reads it off the directory.
        generator_path: klein's second base (METHOD §4); for "flux2" only.
        the others: as of `PipelineBackbone`.

    Raises:
        ValueError: before any weight loads, if the directory is not a complete pipeline of the
            family, or an argument does not fit it.
    """
    if path is None and family != "mixture":
        raise ValueError("model.path is unset: give the directory of a diffusers pipeline")
    path = "" if path is None or family == "mixture" else local_pipeline(path)
    generator_path = None if generator_path is None else local_pipeline(generator_path)
    family = check_pipeline(path, family)
    if generator_path is not None and family != "flux2":
        raise ValueError(f"model.generator_path is for family flux2, not for {family}")
    # diffusers takes seconds to import, so each family is imported when it is asked for
    if family == "mixture":
        from tiltflow.models.families.mixture import MixtureBackbone

        return MixtureBackbone(device=device)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "vae_dtype": vae_dtype,
        "resolution": resolution,
        "max_sequence_length": max_sequence_length,
        "parts": parts,
        "fp8": fp8,
        "base": base,
    }
    if family == "flux2":
        from tiltflow.models.families.flux2 import Flux2Backbone

        return Flux2Backbone(path, generator_path=generator_path, **options)
    if family == "flux":
        from tiltflow.models.families.flux import FluxBackbone as Chosen
    else:
        from tiltflow.models.families.sd3 import SD3Backbone as Chosen  # type: ignore[assignment]
    return Chosen(path, **options)
