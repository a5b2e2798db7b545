"""`tiltflow export`: a run's adapters, scheduler and model card, and the merged pipeline."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import Checkpoint, load_checkpoint
from tiltflow.core.sizes import both, said
from tiltflow.evaluation.files import read_evaluation
from tiltflow.export.card import Card, model_card
from tiltflow.export.contract import (
    CONTRACT_FILE,
    AdapterFacts,
    Contract,
    base_facts,
    licence_file,
    plain_rewards,
    versions,
)
from tiltflow.export.folder import check_export_folder, replacing
from tiltflow.export.writing import (
    FullWeights,
    LoraWeights,
    baked,
    export_adapters,
    exported_adapters,
    few_step_scheduler,
    save_merged,
)
from tiltflow.models.family import Family
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipeline, Pipelines
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint, pipeline_fingerprint
from tiltflow.models.pipelines.meta import meta_backbone
from tiltflow.setup.build import DTYPES


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
    check_export_folder(out)
    cfg = load_config(str(run / "config.yaml"))
    if not cfg.model.has_files:
        raise ValueError(f"the {cfg.model.path} backbone has no pipeline to export for")
    evaluation = read_evaluation(run) if (run / "evaluation.json").is_file() else None
    return export_checkpoint(cfg, load_checkpoint(run), out, merged, tilt, evaluation)


def export_checkpoint(
    cfg: RunConfig,
    checkpoint: Checkpoint,
    out: Path,
    merged: bool = False,
    tilt: float = 1.0,
    evaluation: dict[str, Any] | None = None,
    pipelines: Pipelines | None = None,
) -> list[Path]:
    """What `export_run` writes, from a checkpoint at hand; the paths in `out`. `pipelines` are the
    config's, where something has been read of them already.

    An earlier export in `out` is replaced as a whole, when the new one is.
    """
    source = Source.of(pipelines or cfg.model.pipelines)
    lora = bool(checkpoint.state.get("adapters"))
    if not lora and not merged:
        exported_adapters(checkpoint.state)  # says why there are none
    contract = contract_of(cfg, checkpoint, source)
    with replacing(out) as part:
        folders = export_adapters(checkpoint, source.pipeline, part, contract) if lora else []
        scheduler = few_step_scheduler(
            source.model, contract.eta, contract.steps, contract.resolution
        )
        scheduler.save_pretrained(part / "scheduler")
        paths = [*folders, part / "scheduler"]
        if merged:
            strengths = {f.name: (f, tilt if f.name == "tilt" else 1.0) for f in folders}
            student = LoraWeights(strengths) if lora else FullWeights(checkpoint.tensors["ema"])
            dtype = DTYPES[cfg.model.dtype]
            save_merged(source.pipeline, source.base, student, scheduler, dtype, part / "merged")
            strength = tilt if cfg.stage == "tilt" and lora else None
            _write(part / "merged", contract.model_copy(update={"tilt": strength}))
            paths.append(part / "merged")
        for folder in (*folders, part):
            _write(folder, contract)
        absent = sorted(set(source.base.absent) - set(source.pipeline._optional_components))
        card = Card(
            contract=contract,
            call=call_of(contract, source.family),
            folders=[folder.name for folder in folders],
            merged=merged,
            absent=absent,
            evaluation=evaluation,
        )
        (part / "README.md").write_text(model_card(card), encoding="utf-8")
        licence = licence_file(source.base.root)
        if licence is not None:
            shutil.copyfile(licence, part / licence.name)
        paths.append(part / "README.md")
    return [out / path.relative_to(part) for path in paths]


@dataclass(frozen=True)
class Source:
    """The pipelines of a config on this machine: `model` is the teacher's, `base` the one that the
    student's weights belong to (klein's second, else the same)."""

    model: Pipeline
    base: Pipeline
    family: Family
    pipeline: Any

    @classmethod
    def of(cls, pipelines: Pipelines) -> Source:
        family = check_directory(pipelines.model)
        kind = getattr(diffusers, str(family.pipeline))
        return cls(pipelines.model, pipelines.base, family, kind)


def contract_of(cfg: RunConfig, checkpoint: Checkpoint, source: Source) -> Contract:
    """What the student of a run was trained for."""
    backbone = meta_backbone(
        source.model,
        resolution=cfg.model.resolution,
        max_sequence_length=cfg.model.max_sequence_length,
    )
    state = checkpoint.state
    adapters = exported_adapters(state) if state.get("adapters") else {}
    setting = cfg.model.generator_path or cfg.model.path
    return Contract(
        stage=cfg.stage,
        family=source.family.name,
        pipeline=str(source.family.pipeline),
        base=base_facts(setting, source.base.root, pipeline_fingerprint(source.base)),
        steps=cfg.sampler.steps,
        sigmas=tuple(backbone.few_step_sigmas(cfg.sampler.steps).tolist()),
        eta=cfg.sampler.eta,
        guidance=student_guidance(cfg, backbone),
        resolution=backbone.resolution,
        max_sequence_length=backbone.sequence,
        dtype=cfg.model.dtype,
        adapters={
            name: AdapterFacts(
                rank=settings.rank,
                trained_alpha=float(settings.alpha),
                hash=adapter_fingerprint(baked(checkpoint.tensors[group], settings)[0]),
            )
            for name, (group, settings) in adapters.items()
        },
        recipe=_recipe(cfg, checkpoint.step),
        versions=versions(),
    )


def student_guidance(cfg: RunConfig, backbone: PipelineBackbone) -> float:
    """What the student was called with: `model.student_guidance`, else what its network expects
    (FLUX.1-dev's own scale), else 1.0, a pass without."""
    if cfg.model.student_guidance is not None:
        return cfg.model.student_guidance
    return backbone.student_guidance


def _write(folder: Path, contract: Contract) -> None:
    (folder / CONTRACT_FILE).write_text(contract.text() + "\n", encoding="utf-8")


def call_of(contract: Contract, family: Family) -> dict[str, Any]:
    """The arguments with which the pipeline's call is the student."""
    length = {"max_sequence_length": contract.max_sequence_length} if family.takes_length else {}
    height, width = both(contract.resolution)
    return {
        "num_inference_steps": contract.steps,
        family.guidance_argument: contract.guidance - family.guidance_offset,
        "height": height,
        "width": width,
        **length,
        **family.call,
    }


def _sizes(cfg: RunConfig) -> str:
    """The sizes of `data.buckets` in words."""
    buckets = cfg.data.buckets
    if isinstance(buckets, str) or buckets is None:
        return "each prompt's own"
    return ", ".join(f"{said(bucket.size)} (weight {bucket.weight:g})" for bucket in buckets)


def _recipe(cfg: RunConfig, step: int) -> dict[str, Any]:
    """The settings that say how the student was made; no paths of this machine."""
    train, resolution = cfg.train, cfg.model.resolution
    settings: dict[str, Any] = {
        "stage": cfg.stage,
        "iterations": step,
        "resolution": said(resolution)
        if isinstance(resolution, tuple)
        else resolution or "the model's own",
        **({"sizes": _sizes(cfg)} if cfg.data.buckets is not None else {}),
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
        rewards = plain_rewards({name: reward.weight for name, reward in cfg.rewards.items()})
        settings |= {"group size": cfg.tilt.group_size, "rewards": rewards}
    else:
        settings["consistency γ"] = cfg.cold_start.consistency
    return settings
