"""`tiltflow export`."""

from __future__ import annotations

from pathlib import Path

import diffusers

from tiltflow.backbones import check_pipeline, local_pipeline
from tiltflow.checkpoint import load_checkpoint
from tiltflow.config import load_config
from tiltflow.export import export_adapters
from tiltflow.paths import resolve_path

PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
}


def export_run(run: Path, out: Path) -> list[Path]:
    """The LoRA folders of a run's latest checkpoint, in `out`.

    Raises:
        ValueError: if `run` is no run directory, or its model has no pipeline.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run directory (it has no config.yaml)")
    cfg = load_config(str(run / "config.yaml"))
    if cfg.model.path == "mixture":
        raise ValueError("the mixture backbone has no pipeline to export for")
    family = check_pipeline(local_pipeline(resolve_path(cfg.model.path)), cfg.model.family)
    pipeline = getattr(diffusers, PIPELINES[family])
    return export_adapters(load_checkpoint(run), pipeline, out)
