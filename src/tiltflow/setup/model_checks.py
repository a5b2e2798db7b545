"""A config's model looked at in shape only: what would be found after minutes of loading.

The run's own builders are called, on the meta device: what they refuse there, they would refuse
with weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from tiltflow.config.load import PromptSets, RunConfig
from tiltflow.core.disk import parse_json
from tiltflow.core.latest import latest_name
from tiltflow.core.paths import resolve_path
from tiltflow.core.sizes import Resolution, both, frames_of
from tiltflow.data.embeddings import check_negatives
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import check_guidance
from tiltflow.models.family import published
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipeline, Pipelines
from tiltflow.models.pipelines.headers import header_shapes
from tiltflow.models.pipelines.meta import META, meta_backbone
from tiltflow.models.pipelines.resized import resized
from tiltflow.models.pipelines.weights import check_weights
from tiltflow.models.roles import AdapterSettings
from tiltflow.setup.assemble import buckets_of
from tiltflow.setup.build import DTYPES, build_roles
from tiltflow.setup.starts import Start, grids_of, lora_start, starting_point


def meta_of(
    cfg: RunConfig, pipelines: Pipelines | None = None, resolution: Resolution | None = None
) -> PipelineBackbone:
    """The backbone that `build_backbone` makes, without weights; what is only on the hub is taken
    as it was published. `resolution` is in place of the config's.

    Raises:
        ValueError: as `meta_backbone`.
    """
    model = cfg.model
    pipelines, second = pipelines or model.pipelines, model.generator_path
    there = None if second is None else pipelines.here("generator") or resolve_path(second)
    return meta_backbone(
        pipelines.here("model") or Pipeline(resolve_path(model.path), model.family),
        generator_path=there,
        dtype=DTYPES[model.dtype],
        vae_dtype=DTYPES[model.vae_dtype] if model.vae_dtype else None,
        resolution=resolution or model.resolution,
        max_sequence_length=model.max_sequence_length,
        fp8=model.base_storage == "fp8",
    )


def check_sizes(
    cfg: RunConfig, prompts: Sequence[Prompt], pipelines: Pipelines | None = None
) -> None:
    """Whether every size of `data.buckets` fits the model.

    Raises:
        ValueError: naming the size that does not, or the prompt that has none.
    """
    buckets, pipelines = buckets_of(cfg, prompts), pipelines or cfg.model.pipelines
    if not buckets or not can_look(cfg, pipelines):
        return
    backbone = meta_of(cfg, pipelines)
    for bucket in buckets:
        try:
            resized(backbone, bucket.size)
        except ValueError as error:
            raise ValueError(f"data.buckets: {error}") from error


def check_guided_from(cfg: RunConfig, sets: PromptSets, pipelines: Pipelines | None = None) -> None:
    """Whether the negative prompts of the prompt file are something for the teacher.

    Raises:
        ValueError: as `check_negatives`.
    """
    if cfg.data.columns.negative is None:
        return
    if not cfg.model.has_files:
        raise ValueError(
            f"data.columns.negative is for text, of which the {cfg.model.path} has none"
        )
    pipelines = pipelines or cfg.model.pipelines
    if can_look(cfg, pipelines):
        prompts = [*sets.train, *sets.fixed]
        check_negatives(prompts, meta_of(cfg, pipelines), cfg.model.guidance)


def largest(cfg: RunConfig) -> Resolution | None:
    """Of the sizes that a run is over, that with the most pixels; a column of sizes is not read."""
    own, buckets = cfg.model.resolution, cfg.data.buckets
    sizes = [own] if own else []
    sizes += [bucket.size for bucket in buckets or () if not isinstance(bucket, str)]
    return max(sizes, key=lambda size: frames_of(size) * math.prod(both(size)), default=None)


def check_model(cfg: RunConfig, pipelines: Pipelines | None = None) -> None:
    """Whether the weight files are the networks', and resolution, text length and grids are right.

    A pipeline that is still on the hub is looked at as far as its published configuration goes.

    Raises:
        ValueError: naming the key, and what is wrong.
    """
    pipelines = pipelines or cfg.model.pipelines
    if not can_look(cfg, pipelines):
        return
    for key, name, parts in (
        ("model.path", "model", None),
        ("model.generator_path", "generator", ["transformer"]),
    ):
        pipeline = pipelines.here(name)
        if pipeline is not None:
            try:
                check_weights(pipeline, parts)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    backbone = meta_of(cfg, pipelines)
    check_guidance(backbone, cfg.model.guidance, "model.guidance")
    for steps in cfg.sampler.grids:
        backbone.few_step_sigmas(steps)
    if cfg.stage == "tilt":
        backbone.teacher_sigmas(cfg.watch.teacher_steps)


def check_adapters(cfg: RunConfig, pipelines: Pipelines | None = None) -> None:
    """Whether the adapters, and those that stage 2 starts from, go on the model.

    Raises:
        ValueError: naming what does not fit.
    """
    pipelines = pipelines or cfg.model.pipelines
    if not can_look(cfg, pipelines):
        return
    start = None
    if cfg.model.few_step is not None:
        place = Path(resolve_path(cfg.model.few_step))
        resumed = cfg.run.resume and not place.exists()
        start = starting_point(cfg) if resumed else start_shapes(place)
    with META:
        build_roles(cfg, meta_of(cfg, pipelines), start)


def start_shapes(run: Path) -> Start:
    """`load_start` without a run's weights: its settings, and shapes in place of tensors.

    Raises:
        ValueError: if there is no such checkpoint, or it is not of stage 1; as `read_adapter`.
    """
    name = latest_name(run / "checkpoints")
    if name is None:
        return lora_start(run)
    folder = run / "checkpoints" / name
    try:
        state = parse_json((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} is torn: {error}") from error
    if not isinstance(state, dict) or state.get("stage") != "cold_start":
        raise ValueError(f"model.few_step={run} is not a cold_start run")
    adapters = state.get("adapters")
    ema, fake = (
        {
            key: torch.empty(shape, device=META)
            for key, shape in header_shapes(folder / f"{group}.safetensors").items()
        }
        for group in ("ema", "fake_score")
    )
    return Start(ema, fake, AdapterSettings(**adapters) if adapters else None, grids_of(state))


def can_look(cfg: RunConfig, pipelines: Pipelines) -> bool:
    """Whether there is a configuration for `meta_of`: a directory's, or a published one."""
    if not cfg.model.has_files:
        return False
    return pipelines.here("model") is not None or published(cfg.model.path) is not None
