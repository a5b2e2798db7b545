"""`tiltflow export`: a run's adapters, scheduler and model card, and the merged pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from tiltflow.backbones import check_pipeline, local_pipeline
from tiltflow.backbones.files import HUB_ID, read_json, side_file
from tiltflow.build import DTYPES
from tiltflow.card import Card, model_card
from tiltflow.checkpoint import Checkpoint, load_checkpoint
from tiltflow.config import RunConfig, load_config
from tiltflow.evaluation.files import read_evaluation
from tiltflow.export import (
    FullWeights,
    LoraWeights,
    export_adapters,
    few_step_scheduler,
    save_merged,
)
from tiltflow.paths import resolve_path

PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
}


def export_run(run: Path, out: Path, merged: bool = False, tilt: float = 1.0) -> list[Path]:
    """A run's latest checkpoint in `out`: LoRA folders, `scheduler/` and README.md.

    With `merged` also the whole pipeline; `tilt` in [0, 1] is the strength of stage 2 in it.

    Raises:
        ValueError: if `run` is no run directory, its model has no pipeline, `tilt` is out of
            range, or the run trained copies and `merged` is not asked for.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run directory (it has no config.yaml)")
    if not 0 <= tilt <= 1:
        raise ValueError(f"--tilt is {tilt}; it goes from 0 (stage 1) to 1 (stage 2)")
    cfg = load_config(str(run / "config.yaml"))
    if cfg.model.path == "mixture":
        raise ValueError("the mixture backbone has no pipeline to export for")
    evaluation = read_evaluation(run) if (run / "evaluation.json").is_file() else None
    return export_checkpoint(cfg, load_checkpoint(run), out, merged, tilt, evaluation)


def export_checkpoint(
    cfg: RunConfig,
    checkpoint: Checkpoint,
    out: Path,
    merged: bool = False,
    tilt: float = 1.0,
    evaluation: dict[str, Any] | None = None,
) -> list[Path]:
    """What `export_run` writes, from a checkpoint at hand; the paths in `out`."""
    model = local_pipeline(resolve_path(cfg.model.path))
    family = check_pipeline(model, cfg.model.family)
    pipeline = getattr(diffusers, PIPELINES[family])
    base = cfg.model.generator_path or cfg.model.path
    lora = bool(checkpoint.state.get("adapters"))
    folders = export_adapters(checkpoint, pipeline, out) if lora or not merged else []
    scheduler = few_step_scheduler(model, family, cfg.sampler.eta)
    scheduler.save_pretrained(out / "scheduler")
    paths = [*folders, out / "scheduler"]
    if merged:
        strengths = {f.name: (f, tilt if f.name == "tilt" else 1.0) for f in folders}
        student = LoraWeights(strengths) if lora else FullWeights(checkpoint.tensors["ema"])
        source = local_pipeline(resolve_path(base))
        dtype = DTYPES[cfg.model.dtype]
        save_merged(pipeline, source, student, scheduler, dtype, out / "merged")
        paths.append(out / "merged")
    card = Card(
        stage=cfg.stage,
        pipeline=PIPELINES[family],
        model=base,
        hub_id=base if HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        call=_call(cfg, model, family),
        folders=[folder.name for folder in folders],
        merged=merged,
        recipe=_recipe(cfg, checkpoint.step),
        evaluation=evaluation,
    )
    (out / "README.md").write_text(model_card(card), encoding="utf-8")
    return [*paths, out / "README.md"]


def _call(cfg: RunConfig, model: Path, family: str) -> dict[str, Any]:
    """The arguments with which the pipeline's call is the student: no classifier-free guidance."""
    side = side_file(model)
    guidance = 1.0
    if family == "flux" and read_json(model / "transformer" / "config.json").get("guidance_embeds"):
        from tiltflow.backbones.flux import FluxBackbone

        guidance = float(side.get("guidance", FluxBackbone.default_guidance))
    if cfg.model.student_guidance is not None:
        guidance = cfg.model.student_guidance
    call: dict[str, Any] = {
        "num_inference_steps": cfg.sampler.steps,
        "guidance_scale": guidance,
    }
    if cfg.model.resolution is not None:
        call |= {"height": cfg.model.resolution, "width": cfg.model.resolution}
    tokens = cfg.model.max_sequence_length
    tokens = side.get("max_sequence_length") if tokens is None else tokens
    return call if tokens is None else call | {"max_sequence_length": tokens}


def _recipe(cfg: RunConfig, step: int) -> dict[str, Any]:
    """The settings that say how the student was made; no paths of this machine."""
    train = cfg.train
    settings: dict[str, Any] = {
        "stage": cfg.stage,
        "iterations": step,
        "resolution": cfg.model.resolution or "the model's own",
        "sampler": f"{cfg.sampler.steps} steps, η = {cfg.sampler.eta}",
        "weights": f"LoRA, rank {cfg.adapters.rank}, α = {cfg.adapters.alpha}"
        if cfg.adapters.kind == "lora"
        else "full fine-tuning",
        **({"base in training": "rounded to fp8"} if cfg.model.base_storage else {}),
        "global batch": train.batch_size,
        "learning rates": f"generator {train.generator_lr:g}, fake score {train.fake_score_lr:g}",
        "teacher guidance": cfg.model.guidance or "the model's own",
        "EMA": train.ema,
        "seed": cfg.run.seed,
    }
    if cfg.stage == "tilt":
        rewards = (f"{name} × {reward.weight:g}" for name, reward in cfg.rewards.items())
        settings |= {"group size": cfg.tilt.group_size, "rewards": ", ".join(rewards)}
    else:
        settings["consistency γ"] = cfg.cold_start.consistency
    return settings
