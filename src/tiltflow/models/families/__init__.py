"""Model families: each makes its networks velocities behind one protocol, `backbone.Backbone`."""

from __future__ import annotations

from pathlib import Path

import torch

from tiltflow.core.sizes import Resolution
from tiltflow.models.backbone import Backbone, Base, Loading, Parts
from tiltflow.models.family import Family, families, family_named, has_files
from tiltflow.models.pipelines.directory import Pipeline, Pipelines, local_pipeline
from tiltflow.models.pipelines.files import check_pipeline

__all__ = ["Pipeline", "Pipelines", "check_pipeline", "load_backbone", "local_pipeline", "opened"]

MIXTURE = Family("mixture", "tiltflow.models.families.mixture:MixtureBackbone", title="mixture")
"""The one family without files."""


def load_backbone(
    path: str | Path | Pipeline | None,
    *,
    family: str | None = None,
    generator_path: str | Path | Pipeline | None = None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    resolution: Resolution | None = None,
    max_sequence_length: int | None = None,
    parts: Parts = "all",
    fp8: bool = False,
    base: Base = "device",
) -> Backbone:
    """The backbone of a pipeline directory, or of a family without files (which reads no path).

    Args:
        family: its name, or `module:RECORD`; None reads it off the directory.
        generator_path: the pipeline that the generator starts from (METHOD §4), for families that
            take one.
        the others: as of `Loading`.

    Raises:
        ValueError: before any weight loads, if the directory is not a complete pipeline of the
            family, or an argument does not fit it.
    """
    loading = Loading(device, dtype, vae_dtype, resolution, max_sequence_length, parts, fp8, base)
    if isinstance(path, str) and family is None and not has_files(path):
        family = path
    if not has_files(None, family):
        assert family is not None
        if generator_path is not None:
            raise ValueError(_no_generator(family))
        made: Backbone = family_named(family).backbone_class()(device=device)
        return made
    if path is None:
        raise ValueError("model.path is unset: give the directory of a diffusers pipeline")
    pipeline = opened(path, family)
    generator = None if generator_path is None else opened(generator_path, family)
    record = pipeline.family
    if generator is not None and not record.twin:
        raise ValueError(_no_generator(record.name))
    if generator is not None and generator.asked is None:
        generator.asked = pipeline.asked or record.name
    loaded: Backbone = record.backbone_class()(record, pipeline, loading, generator)
    return loaded


def opened(place: str | Path | Pipeline, family: str | None = None) -> Pipeline:
    """A directory, or a hub id, as a pipeline that is read once.

    Raises:
        ValueError: as `local_pipeline`.
    """
    return place if isinstance(place, Pipeline) else Pipeline(local_pipeline(place), family)


def _no_generator(name: str) -> str:
    takers = ", ".join(family.name for family in families() if family.twin)
    return f"model.generator_path is for family {takers}, not for {name}"
