"""Whether a run's checkpoints and its export will have room on the disk, before anything is made.

Sizes are read off the headers of the transformer's files: what the adapters will be is known from
the shapes of the matrices that they go on. Where a recipe leaves the choice of these to the model,
all are counted, which is more than will be written.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

from tiltflow.config.schema import RunConfig
from tiltflow.models.pipelines.directory import Pipelines

FP32 = 4
MOMENTS = 2
"""What AdamW keeps beside each trained number."""


def check_disk_room(cfg: RunConfig, pipelines: Pipelines | None = None) -> None:
    """That what the run will write has room; a pipeline of the hub and the mixture pass unseen.

    Raises:
        ValueError: with what is free, what is needed, and what needs less.
    """
    out = Path(cfg.run.out)
    needed, count = run_bytes(cfg, pipelines), kept_checkpoints(cfg)
    there = _size(out / "checkpoints") + _size(out / "export")
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed - there > free:
        raise ValueError(
            f"run.out {out}: the disk has {_gb(free)} free, and {count} checkpoints and the export "
            f"of this run need about {_gb(needed - there)}: free some space, give another run.out, "
            "or lower checkpoint.keep or adapters.rank"
        )


def run_bytes(cfg: RunConfig, pipelines: Pipelines | None = None) -> int:
    """What a run has on the disk at its fullest: checkpoints, one more while it is written, and
    the export; 0 where the model's files are not at hand."""
    model = (pipelines or cfg.model.pipelines).here("model") if cfg.model.has_files else None
    if model is None:
        return 0
    shapes = {name: entry.shape for name, entry in model.header("transformer").items()}
    role = FP32 * trained_numbers(cfg, shapes)
    scores = cfg.sampler.boundaries if cfg.train.fake_scores == "per_boundary" else 1
    roles = 1 + 1 + scores  # generator, its average, fake scores
    checkpoint = role * (roles + MOMENTS * (1 + scores))
    export = role if cfg.adapters.kind == "lora" else 0
    if cfg.stage == "tilt" and cfg.adapters.kind == "lora":  # stage 1's adapters go with it
        frozen = scores if cfg.tilt.fake_score_start == "fresh" else 0
        checkpoint, export = checkpoint + role * (1 + frozen), export + role
    return kept_checkpoints(cfg) * checkpoint + export


def kept_checkpoints(cfg: RunConfig) -> int:
    """`checkpoint.keep`, the last good one of a watch, and the one that is being written."""
    watched = cfg.stage == "tilt" and bool(cfg.watch.rewards)
    return cfg.checkpoint.keep + 1 + (1 if watched else 0)


def trained_numbers(cfg: RunConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """The numbers of one role: a LoRA's on the matrices of its targets, or all of a copy's."""
    if cfg.adapters.kind == "copies":
        return sum(math.prod(shape) for shape in shapes.values())
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    targets = cfg.adapters.targets
    return sum(
        cfg.adapters.rank * sum(shape) for name, shape in matrices.items() if _chosen(name, targets)
    )


def _chosen(name: str, targets: str | tuple[str, ...] | None) -> bool:
    """As PEFT chooses: a regular expression for the whole name, or names' ends."""
    if targets is None:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in targets)


def _size(folder: Path) -> int:
    """The bytes of the files in a folder, 0 where there is none; links count as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if not path.is_symlink():
                total += path.stat().st_size
    return total


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"
