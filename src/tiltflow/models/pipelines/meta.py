"""Pipelines as shapes only: on the meta device, from configurations, without any weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltflow.core.sizes import Resolution
from tiltflow.models.backbone import Loading
from tiltflow.models.family import Family, family_of_class, published
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipeline, is_part, none_of
from tiltflow.models.pipelines.weights import META, meta_model


def pipeline_configs(place: str | Path | Pipeline) -> Mapping[str, Any]:
    """A pipeline's class and its parts' configurations, of a directory or a published hub id.

    Raises:
        ValueError: if there is neither, or a part of the directory has no configuration.
    """
    pipeline = Pipeline.of(place)
    known = None if pipeline.root.exists() else published(str(pipeline))
    if known is not None:
        return known.configs
    # Besides parts, an index holds flags of the pipeline's constructor, such as `is_distilled`.
    configs: dict[str, Any] = {
        name: entry for name, entry in pipeline.index.items() if not is_part(entry)
    }
    for part, entry in pipeline.index.items():
        if not is_part(entry) or not any(entry) or part.startswith(NOT_NETWORKS):
            continue
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        if not pipeline.has(f"{part}/{file}"):
            raise ValueError(f"{pipeline} is not complete: {part}/{file} is missing")
        configs[part] = {**pipeline.json(f"{part}/{file}"), "_class_name": entry[1]}
    for clip in ("tokenizer_2", "tokenizer"):  # the pipeline asks the first, if it is there
        if pipeline.has(f"{clip}/tokenizer_config.json"):
            settings = pipeline.json(f"{clip}/tokenizer_config.json")
            configs["tokenizer_max_length"] = settings.get("model_max_length")
    return configs


NOT_NETWORKS = ("tokenizer", "processor", "feature_extractor")


def meta_backbone(
    place: str | Path | Pipeline,
    *,
    generator_path: str | Path | Pipeline | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    resolution: Resolution | None = None,
    max_sequence_length: int | None = None,
    fp8: bool = False,
    size_name: str = "model.resolution=",
) -> PipelineBackbone:
    """`load_backbone` without weights: every method but `encode` works, on meta tensors.

    Raises:
        ValueError: as `pipeline_configs`, if the class is none of the families', or the resolution
            or the parts do not fit.
    """
    pipeline = Pipeline.of(place)
    configs = pipeline_configs(pipeline)
    family = _family(pipeline, str(configs["_class_name"]))
    loading = Loading(
        META, dtype, vae_dtype, resolution, max_sequence_length, fp8=fp8, size_name=size_name
    )
    second, given = None, None
    if generator_path is not None and family.twin:
        given = pipeline_configs(generator_path)
        second = _cast(meta_model(given["transformer"]), dtype)
    made: PipelineBackbone = family.backbone_class()(
        family,
        pipeline,
        loading,
        pipe=meta_pipeline(configs, dtype, vae_dtype or dtype),
        generator_network=second,
        generator_config=given,
    )
    return made


def _family(pipeline: Pipeline, kind: str) -> Family:
    if pipeline.root.exists():
        return pipeline.family
    found = family_of_class(kind)
    if found is None:
        raise ValueError(f"{pipeline} holds a {none_of(kind)}")
    return found


def meta_pipeline(configs: Mapping[str, Any], dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    """The pipeline with its transformer, autoencoder and scheduler, and no text encoder."""
    import diffusers

    from tiltflow.models.pipelines.processor import Silent, TextProcessor
    from tiltflow.scheduler import CPSFlowMatchScheduler

    kind = getattr(diffusers, str(configs["_class_name"]))
    named = configs["scheduler"].get("_class_name", "FlowMatchEulerDiscreteScheduler")
    merged = named == CPSFlowMatchScheduler.__name__
    schedule = CPSFlowMatchScheduler if merged else getattr(diffusers, named)
    with torch.device("cpu"):  # its levels are read, also where all else has shapes only
        scheduler = schedule.from_config(
            {k: v for k, v in configs["scheduler"].items() if not k.startswith("_")}
        )
    parts = inspect.signature(kind.__init__).parameters
    given: dict[str, Any] = {
        n: None for n in parts if n.startswith(("text_encoder", *NOT_NETWORKS))
    }
    given |= {n: TextProcessor(Silent()) for n in parts if n == "processor"}
    given |= {n: configs[n] for n in parts if not isinstance(configs.get(n, {}), Mapping)}
    given |= {
        "transformer": _cast(meta_model(configs["transformer"]), dtype),
        "vae": _cast(meta_model(configs["vae"]), vae_dtype),
        "scheduler": scheduler,
    }
    pipe = kind(**given)
    length = configs.get("tokenizer_max_length")
    if isinstance(length, int) and hasattr(pipe, "tokenizer_max_length"):
        pipe.tokenizer_max_length = length
    return pipe


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Not by diffusers' own `to`, which warns of what it does not do."""
    return nn.Module.to(network, dtype)


def text_encoders(path: str | Path | Pipeline) -> dict[str, nn.Module]:
    """A pipeline's text encoders by their parts' names, in fp32 and on the meta device."""
    configs = pipeline_configs(path)
    return {
        part: meta_model(config)
        for part, config in configs.items()
        if part.startswith("text_encoder") and isinstance(config, Mapping)
    }
