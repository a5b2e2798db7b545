"""`tiltflow export`: what a run has trained, in the formats of the programs that run it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import Checkpoint, load_checkpoint
from tiltflow.core.sentences import counted, either
from tiltflow.core.sizes import said, same_as
from tiltflow.evaluation.files import is_of, read_evaluation
from tiltflow.formats.card import Card, model_card, usage_of
from tiltflow.formats.contract import (
    CONTRACT_FILE,
    AdapterFacts,
    Contract,
    base_facts,
    licence_file,
    merged_tilts,
    plain_rewards,
    versions,
)
from tiltflow.formats.folder import check_export_folder, replacing
from tiltflow.formats.guides import guides
from tiltflow.formats.keys import has_layout, layout_of
from tiltflow.formats.loras import SINGLE, Lora, both, loras_of
from tiltflow.formats.programs import (
    Shapes,
    check_fit,
    shapes_of,
    write_comfyui,
    write_kohya,
    write_original,
    write_peft,
)
from tiltflow.formats.wanted import Wanted
from tiltflow.formats.workflow import no_workflow, workflow, write_workflow
from tiltflow.formats.writing import (
    FullWeights,
    LoraWeights,
    baked,
    exported_adapters,
    few_step_scheduler,
    rounded_away,
    save_adapter,
    save_merged,
)
from tiltflow.models.family import Family
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipeline, Pipelines
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint, pipeline_fingerprint
from tiltflow.models.pipelines.meta import meta_backbone
from tiltflow.models.pipelines.resized import resized
from tiltflow.models.switch import FEW_STEP, TILT
from tiltflow.setup.build import DTYPES
from tiltflow.setup.run_directory import check_run
from tiltflow.tasks.callbacks import SILENT, Callbacks

if TYPE_CHECKING:
    from tiltflow.scheduler import CPSFlowMatchScheduler


def export_run(
    run: Path, out: Path, wanted: Wanted | None = None, callbacks: Callbacks = SILENT
) -> list[Path]:
    """A run's latest checkpoint in `out`, in the formats that are wanted, with README.md.

    Raises:
        ValueError: if `run` is no run directory, its model has no pipeline, strengths are wanted
            of a run that has no tilt, or LoRAs of one that trained copies.
    """
    check_run(run)
    check_export_folder(out)
    cfg = load_config(str(run / "config.yaml"))
    if not cfg.model.has_files:
        raise ValueError(f"the {cfg.model.path} backbone has no pipeline to export for")
    evaluation = read_evaluation(run) if (run / "evaluation.json").is_file() else None
    return export_checkpoint(
        cfg, load_checkpoint(run), out, wanted, evaluation, callbacks=callbacks
    )


def export_checkpoint(
    cfg: RunConfig,
    checkpoint: Checkpoint,
    out: Path,
    wanted: Wanted | None = None,
    evaluation: dict[str, Any] | None = None,
    pipelines: Pipelines | None = None,
    callbacks: Callbacks = SILENT,
) -> list[Path]:
    """What `export_run` writes, from a checkpoint at hand; the paths in `out`. `pipelines` are the
    config's, where something has been read of them already. `callbacks` are told what a user may
    not expect.

    An earlier export in `out` is replaced as a whole, when the new one is.
    """
    wanted, source = wanted or Wanted(), Source.of(pipelines or cfg.model.pipelines)
    _check_wanted(wanted, checkpoint)
    contract = contract_of(cfg, checkpoint, source)
    _check_base(checkpoint, contract, source)
    lora = bool(checkpoint.state.get("adapters"))
    loras = loras_of(checkpoint, contract, wanted.strengths) if lora else []
    shapes = shapes_of(source.base)
    for one in loras:
        check_fit(one, shapes)
    with replacing(out) as part:
        paths = _write_loras(wanted, loras, source, shapes, part)
        if {"diffusers", "merged", "peft"} & set(wanted.formats):
            scheduler = _scheduler(source, contract)
            scheduler.save_pretrained(part / "scheduler")
            paths.append(part / "scheduler")
        if "merged" in wanted.formats:
            paths += _write_merged(wanted, loras, checkpoint, contract, source, part, callbacks)
        _write(part, contract)
        usage = usage_of(contract, source.family, _absent(source))
        card = Card(
            usage=usage,
            caution=source.family.caution,
            folders=[one.name for one in loras if "diffusers" in wanted.formats],
            merged=merged_tilts(paths),
            evaluation=_figures(evaluation, contract, callbacks),
            others=guides(wanted, [one.name for one in loras], usage),
        )
        (part / "README.md").write_text(model_card(card), encoding="utf-8")
        if (licence := licence_file(source.base.root)) is not None:
            shutil.copyfile(licence, part / licence.name)
        paths.append(part / "README.md")
    for line in _notices(wanted, loras, contract, checkpoint.step):
        callbacks.notice(line)
    return [out / path.relative_to(part) for path in paths]


def _figures(
    evaluation: dict[str, Any] | None, contract: Contract, callbacks: Callbacks
) -> dict[str, Any] | None:
    """An evaluation, unless it is of an earlier student or may be of one, which is said."""
    if evaluation is None or is_of(evaluation, contract.hashes, contract.weights):
        return evaluation
    reason = "is of other weights than this checkpoint's"
    if contract.weights and not evaluation.get("weights"):  # an earlier version's, of full copies
        reason = "does not say which weights it is of"
    callbacks.notice(
        f"evaluation.json {reason}, so the card has no figures: evaluate this export, and export "
        "again"
    )
    return None


def _notices(wanted: Wanted, loras: list[Lora], contract: Contract, step: int) -> list[str]:
    lines = [
        f"{one.name} is as it began, all zeros: in {counted(step, 'iteration')} the generator's "
        "average has taken no step (train.ema_interval, cold_start.generator_every)"
        for one in loras
        if one.name in SINGLE
        and not any(bool(w.any()) for name, w in one.weights.items() if ".lora_B." in name)
    ]
    if "comfyui" in wanted.formats and (reason := no_workflow(contract)) is not None:
        lines.append(f"{reason}: README.md says at which levels the student samples")
    return lines


def _check_base(checkpoint: Checkpoint, contract: Contract, source: Source) -> None:
    """That the base is the one that was trained on: the export names it, and may be merged into it.

    Raises:
        ValueError: if it holds other weights now. Checkpoints of early versions do not say.
    """
    manifest = checkpoint.state.get("manifest")
    if not isinstance(manifest, dict):
        return
    trained = manifest.get("generator_base") or manifest.get("base")
    if trained is not None and trained != contract.base.hash:
        raise ValueError(
            f"{source.base} holds other weights (hash {contract.base.hash[:8]}) than the run was "
            f"trained on ({trained[:8]}): bring those back, or set model.path in the run's "
            "config.yaml to where they are"
        )


def _check_wanted(wanted: Wanted, checkpoint: Checkpoint) -> None:
    """Raises ValueError if the run has not what is wanted."""
    if not checkpoint.state.get("adapters"):
        lora = set(wanted.formats) - {"diffusers", "merged"}
        if lora or "merged" not in wanted.formats:
            exported_adapters(checkpoint.state)  # says why there are none
        if wanted.strengths:
            raise ValueError(
                "this run trained full copies (adapters.kind=copies), which have no tilt apart: "
                "leave --tilt out"
            )
    if wanted.strengths and not checkpoint.state.get("few_step_adapters"):  # None in stage 1
        raise ValueError("this run has no tilt, which stage 2 trains: leave --tilt out")


def _write_loras(
    wanted: Wanted, loras: list[Lora], source: Source, shapes: Shapes, part: Path
) -> list[Path]:
    """Every LoRA in every format of LoRAs that is wanted."""
    paths = []
    if "diffusers" in wanted.formats:
        for one in loras:
            save_adapter(source.pipeline, one.weights, one.settings, part / one.name, one.contract)
            _write(part / one.name, one.contract)
            paths.append(part / one.name)
    if {"comfyui", "kohya"} & set(wanted.formats):
        layout = layout_of(source.family.name)
        rows = {name: shape[0] for name, shape in shapes.items()}
        if "comfyui" in wanted.formats:
            folder = part / "comfyui"
            paths += [write_comfyui(one, layout, rows, folder) for one in loras]
            single = [(f"{one.name}.safetensors", 1.0) for one in loras if one.name in SINGLE]
            if no_workflow(loras[0].contract) is None:
                paths.append(write_workflow(workflow(loras[0].contract, single), folder))
        if "kohya" in wanted.formats:
            paths += [write_kohya(one, layout, rows, part / "kohya") for one in loras]
    if "peft" in wanted.formats:
        paths += [write_peft(one, part / "peft") for one in loras]
    return paths


def _write_merged(
    wanted: Wanted,
    loras: list[Lora],
    checkpoint: Checkpoint,
    contract: Contract,
    source: Source,
    part: Path,
    callbacks: Callbacks,
) -> list[Path]:
    """For each strength the merged pipeline, and its transformer as one file where the original
    names of its family are known."""
    strengths = wanted.strengths or (1.0,)
    tilted = any(one.name == TILT for one in loras)
    family, paths, scheduler = source.family.name, [], _scheduler(source, contract)
    for strength in strengths:
        end = f"_{strength:g}" if len(strengths) > 1 else ""
        folder, file = part / f"merged{end}", part / "original" / f"transformer{end}.safetensors"
        own = contract.model_copy(update={"tilt": strength if tilted else None})
        dtypes = {part: DTYPES[kind] for part, kind in contract.kept_in.items()}
        with TemporaryDirectory() as place:
            student = _student(loras, checkpoint, strength, source, Path(place))
            kept = save_merged(source.pipeline, source.base, student, scheduler, dtypes, folder)
        lines = rounded_away(folder.name, kept, contract.dtype)
        _write(folder, own)
        paths.append(folder)
        if has_layout(family):
            layout = layout_of(family)
            lines += write_original(folder / "transformer", layout, wanted.dtype, file, own)
            paths.append(file)
            if no_workflow(own) is None:
                graph = workflow(own, transformer=file.name)
                paths.append(write_workflow(graph, file.parent, f"workflow{end}.json"))
        for line in lines:
            callbacks.notice(line)
    return paths


def _student(
    loras: list[Lora], checkpoint: Checkpoint, strength: float, source: Source, place: Path
) -> LoraWeights | FullWeights:
    """What is merged: the adapters as one, a folder at `place`, or a whole transformer."""
    if not loras:
        return FullWeights(checkpoint.tensors["ema"])
    single = {one.name: (one.weights, one.settings) for one in loras if one.name in SINGLE}
    save_adapter(source.pipeline, *both(single[FEW_STEP], single.get(TILT), strength), place)
    return LoraWeights(place)


def _absent(source: Source) -> list[str]:
    """Parts that the base was saved without and that its class has no place for a lack of."""
    return sorted(set(source.base.absent) - set(source.pipeline._optional_components))


def _scheduler(source: Source, contract: Contract) -> CPSFlowMatchScheduler:
    return few_step_scheduler(
        source.model, contract.eta, contract.several or contract.steps, contract.resolution
    )


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
        import diffusers

        kind = getattr(diffusers, str(family.pipeline))
        return cls(pipelines.model, pipelines.base, family, kind)


def contract_of(cfg: RunConfig, checkpoint: Checkpoint, source: Source) -> Contract:
    """What the student of a run was trained for. Its call is at the model's own size where it was
    trained for that, else at the most frequent of its sizes."""
    backbone = meta_backbone(
        source.model,
        generator_path=None if source.base is source.model else source.base,
        resolution=cfg.model.resolution,
        max_sequence_length=cfg.model.max_sequence_length,
    )
    state, steps = checkpoint.state, cfg.sampler.most
    adapters = exported_adapters(state) if state.get("adapters") else {}
    setting = cfg.model.generator_path or cfg.model.path
    sizes = tuple(map(same_as, state.get("sizes", ())))
    if sizes and backbone.resolution not in sizes:
        backbone = resized(backbone, sizes[0])
    sigmas = tuple(backbone.few_step_sigmas(steps).tolist())
    sized = {s: tuple(resized(backbone, s).few_step_sigmas(steps).tolist()) for s in sizes}
    return Contract(
        stage=cfg.stage,
        family=source.family.name,
        pipeline=str(source.family.pipeline),
        base=base_facts(setting, source.base.root, pipeline_fingerprint(source.base)),
        steps=steps,
        several=cfg.sampler.grids if len(cfg.sampler.grids) > 1 else (),
        sigmas=sigmas,
        eta=cfg.sampler.eta,
        guidance=student_guidance(cfg, backbone),
        resolution=backbone.resolution,
        sizes=sizes if len(sizes) > 1 else (),
        sized_sigmas={said(size): levels for size, levels in sized.items() if levels != sigmas},
        max_sequence_length=backbone.sequence,
        dtype=cfg.model.dtype,
        vae_dtype=cfg.model.vae_dtype,
        adapters={
            name: AdapterFacts(
                rank=settings.rank,
                trained_alpha=float(settings.alpha),
                hash=adapter_fingerprint(baked(checkpoint.tensors[group], settings)[0]),
            )
            for name, (group, settings) in adapters.items()
        },
        absent=source.model.absent_encoders,
        weights=None if adapters else adapter_fingerprint(checkpoint.tensors["ema"]),
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
        "sampler": f"{either(cfg.sampler.grids)} steps, η = {cfg.sampler.eta}",
        "weights": f"LoRA, rank {cfg.adapters.rank}, α = {cfg.adapters.alpha}"
        if cfg.adapters.kind == "lora"
        else "full fine-tuning",
        **({"base in training": "rounded to fp8"} if cfg.model.base_storage else {}),
        "global batch": train.batch_size,
        "learning rates": f"generator {train.generator_lr:g}, fake score {train.fake_score_lr:g}",
        "teacher guidance": "the model's own" if cfg.model.guidance is None else cfg.model.guidance,
        "EMA": train.ema,
        "seed": cfg.run.seed,
    }
    if cfg.stage == "tilt":
        rewards = plain_rewards({name: reward.weight for name, reward in cfg.rewards.items()})
        settings |= {"group size": cfg.tilt.group_size, "rewards": rewards}
    else:
        settings["consistency γ"] = cfg.cold_start.consistency
    return settings
