"""Pipelines as shapes only: on the meta device, from configurations, without any weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.files import FAMILIES, pipeline_index, read_json
from tiltflow.models.pipelines.published import PUBLISHED
from tiltflow.models.pipelines.weights import META, meta_model
from tiltflow.scheduler import CPSFlowMatchScheduler


def pipeline_configs(path: str | Path) -> dict[str, Any]:
    """A pipeline's class and its parts' configurations, of a directory or a published hub id.

    Raises:
        ValueError: if there is neither, or a part of the directory has no configuration.
    """
    root = Path(path)
    if not root.exists() and str(path) in PUBLISHED:
        return PUBLISHED[str(path)]
    index = pipeline_index(root)
    configs: dict[str, Any] = {
        "_class_name": index.get("_class_name"),
        "is_distilled": index.get("is_distilled", False),
    }
    for part, entry in index.items():
        if not isinstance(entry, list) or not any(entry) or part.startswith("tokenizer"):
            continue
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        if not (root / part / file).is_file():
            raise ValueError(f"{root} is not complete: {part}/{file} is missing")
        configs[part] = {**read_json(root / part / file), "_class_name": entry[1]}
    for clip in ("tokenizer_2", "tokenizer"):  # the pipeline asks the first, if it is there
        settings = root / clip / "tokenizer_config.json"
        if settings.is_file():
            configs["tokenizer_max_length"] = read_json(settings).get("model_max_length")
    return configs


def meta_backbone(
    path: str | Path,
    *,
    generator_path: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    resolution: int | None = None,
    max_sequence_length: int | None = None,
    fp8: bool = False,
) -> PipelineBackbone:
    """`load_backbone` without weights: every method but `encode` works, on meta tensors.

    Raises:
        ValueError: as `pipeline_configs`, if the class is none of the families', or the resolution
            or the parts do not fit.
    """
    configs = pipeline_configs(path)
    family = FAMILIES.get(str(configs["_class_name"]))
    if family is None:
        raise ValueError(f"{path} holds a {configs['_class_name']}, none of {', '.join(FAMILIES)}")
    options: dict[str, Any] = {
        "device": META,
        "dtype": dtype,
        "resolution": resolution,
        "max_sequence_length": max_sequence_length,
        "fp8": fp8,
        "pipe": meta_pipeline(configs, dtype, vae_dtype or dtype),
    }
    if family == "sd3":
        from tiltflow.models.families.sd3 import SD3Backbone

        return SD3Backbone(path, **options)
    if family == "flux":
        from tiltflow.models.families.flux import FluxBackbone

        return FluxBackbone(path, **options)
    from tiltflow.models.families.flux2 import Flux2Backbone

    if generator_path is not None:
        second = pipeline_configs(generator_path)["transformer"]
        options["generator"] = _cast(meta_model(second), dtype)
    return Flux2Backbone(path, **options)


def meta_pipeline(configs: Mapping[str, Any], dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    """The pipeline with its transformer, autoencoder and scheduler, and no text encoder."""
    kind = getattr(diffusers, str(configs["_class_name"]))
    merged = configs["scheduler"].get("_class_name") == CPSFlowMatchScheduler.__name__
    schedule = CPSFlowMatchScheduler if merged else diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = schedule.from_config(
        {k: v for k, v in configs["scheduler"].items() if not k.startswith("_")}
    )
    parts = inspect.signature(kind.__init__).parameters
    absent = [name for name in parts if name.startswith(("text_encoder", "tokenizer"))]
    given: dict[str, Any] = dict.fromkeys(absent)
    if configs["_class_name"] == "Flux2KleinPipeline":
        given["is_distilled"] = bool(configs.get("is_distilled", False))
    pipe = kind(
        transformer=_cast(meta_model(configs["transformer"]), dtype),
        vae=_cast(meta_model(configs["vae"]), vae_dtype),
        scheduler=scheduler,
        **given,
    )
    length = configs.get("tokenizer_max_length")
    if isinstance(length, int) and hasattr(pipe, "tokenizer_max_length"):
        pipe.tokenizer_max_length = length
    return pipe


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Not by diffusers' own `to`, which warns of what it does not do."""
    return nn.Module.to(network, dtype)


def text_encoders(path: str | Path) -> dict[str, nn.Module]:
    """A pipeline's text encoders by their parts' names, in fp32 and on the meta device."""
    configs = pipeline_configs(path)
    return {part: meta_model(configs[part]) for part in configs if part.startswith("text_encoder")}
