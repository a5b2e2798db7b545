"""The sizes of pictures that one call samples, and the systems that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tiltflow.core.sizes import Resolution, said
from tiltflow.data.buckets import Bucket, by_column
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.scores import AtSize, System
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.resized import resized
from tiltflow.tasks.systems import Loaded, Sampler


def buckets_asked(
    sizes: Sequence[Resolution] | None, column: str | None, prompts: Sequence[Prompt]
) -> tuple[Bucket, ...]:
    """Every prompt at each of `sizes`, or each at the size in its `column`; empty without both.

    Raises:
        ValueError: if a size is given twice, or a prompt has none.
    """
    if column is not None:
        return tuple(by_column(column, prompts, where="--column size"))
    chosen = list(sizes or ())
    for size in chosen:
        if chosen.count(size) > 1:
            raise ValueError(f"--size {said(size)} is given twice")
    return tuple(Bucket(size) for size in chosen)


def check_sizes(buckets: Sequence[Bucket], shapes: PipelineBackbone) -> None:
    """Whether each size fits the model.

    Raises:
        ValueError: naming the first that does not.
    """
    for bucket in buckets:
        resized(shapes, bucket.size, "--size " if bucket.prompts is None else "the size ")


def at_sizes(
    buckets: Sequence[Bucket],
    loaded: Loaded,
    sampler: Sampler,
    systems: slice,
    teacher: bool,
) -> list[AtSize]:
    """Those `systems` of a sampler's at each size; without sizes, at the model's own."""
    count = len(sampler.encoded)
    if not buckets:
        return [AtSize("", range(count), sampler.systems(loaded, teacher)[systems])]
    return [
        AtSize(
            said(bucket.size),
            range(count) if bucket.prompts is None else bucket.prompts,
            _systems(bucket.size, loaded, sampler, teacher)[systems],
            folder=bucket.prompts is None and len(buckets) > 1,
        )
        for bucket in buckets
    ]


def _systems(size: Resolution, loaded: Loaded, sampler: Sampler, teacher: bool) -> list[System]:
    assert isinstance(loaded.backbone, PipelineBackbone)  # `Request.settled` has seen to it
    backbone = resized(loaded.backbone, size)
    own = None if loaded.teacher is None else replace(loaded.teacher, backbone=backbone)
    students = {n: replace(role, backbone=backbone) for n, role in loaded.students.items()}
    return sampler.systems(Loaded(backbone, own, students), teacher)
