"""From a validated config to the objects of a run: the config stops here and in `assemble`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from tiltflow.config.load import PromptSets, RunConfig, read_prompts
from tiltflow.core.distributed import ALONE, Ranks, shard
from tiltflow.core.paths import embedding_cache
from tiltflow.core.precision import attention_of, autocast_dtype
from tiltflow.data.embedding_cache import EmbeddingCache, EncoderKey, encoded_sets
from tiltflow.data.embeddings import BATCH, EncodedPrompts
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Backbone, Base, Parts
from tiltflow.models.compiled import compile_blocks
from tiltflow.models.families import load_backbone
from tiltflow.models.family import graph_families
from tiltflow.models.graphs import graphs_for
from tiltflow.models.medium import load_medium
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.files import check_directory, check_teacher
from tiltflow.models.pipelines.fingerprint import encoder_facts
from tiltflow.models.pipelines.products import take_onednn
from tiltflow.models.roles import AdapterSettings, Roles, adapter_roles, copy_roles
from tiltflow.setup.assemble import buckets_of, make_stages
from tiltflow.setup.facts import Facts
from tiltflow.setup.starts import Start, check_grids, continues, starting_point
from tiltflow.setup.watch_prompts import looked_at, spreads
from tiltflow.training.cold_start import ColdStart
from tiltflow.training.loop import Stage
from tiltflow.training.tilt import Tilt
from tiltflow.training.updates import Share

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Build:
    """A stage ready to run, and what the commands need beside it."""

    stage: ColdStart | Tilt
    backbone: Backbone
    prompts: EncodedPrompts
    fixed: EncodedPrompts | None
    """The prompts of samples and held-out rewards, where the config asks for either."""
    facts: Facts
    running: Stage
    """What the loop runs: the stage, or one for each size of pictures."""


def device_of(name: str) -> torch.device:
    """The device of `run.device`; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if torch knows no such device, or this machine has none.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"there is no device {name!r}: give cpu, cuda, cuda:1, mps or auto"
        ) from error
    count = torch.accelerator.device_count() if found and found.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(f"this machine has no device {name!r}: run on cpu, or give auto")
    return device


def build_backbone(
    cfg: RunConfig,
    parts: Parts = "all",
    ranks: Ranks = ALONE,
    pipelines: Pipelines | None = None,
) -> Backbone:
    """The model of a config, or only what encodes its prompts, or only the rest.

    A transformer that the ranks will share stays in rank 0's main memory. `pipelines` are the
    config's, where something has been read of them already.

    Raises:
        ValueError: as `load_backbone`, or if the model is a merged student, which is no teacher.
    """
    model = cfg.model
    pipelines = pipelines or model.pipelines
    if model.has_files:
        check_teacher(pipelines.model)  # here too: one on the hub could not be looked at before
    shared: Base = "host" if ranks.main else "empty"
    base: Base = shared if _sharded(cfg, ranks) else "device"
    backbone = load_backbone(
        pipelines.model if model.has_files else model.path,
        family=model.family,
        generator_path=pipelines.generator if model.has_files else model.generator_path,
        device=device_of(cfg.run.device),
        dtype=DTYPES[model.dtype],
        vae_dtype=DTYPES[model.vae_dtype] if model.vae_dtype else None,
        resolution=model.resolution,
        max_sequence_length=model.max_sequence_length,
        parts=parts,
        fp8=model.base_storage == "fp8",
        base=base,
    )
    if model.medium is not None:
        backbone.medium = load_medium(model.medium)
    if isinstance(backbone, PipelineBackbone) and parts != "text":
        backbone.fuse(mixed=autocast_dtype(model.autocast, backbone.device) is not None)
        if cfg.adapters.kind == "lora" and base == "device":
            take_onednn(backbone.teacher_base, backbone.student_base)
        if "decoder" in model.checkpointed:
            backbone.checkpoint_decoder()
    return backbone


def encode_sets(
    cfg: RunConfig,
    sets: Sequence[Sequence[Prompt]],
    progress: Callable[[str], None] = lambda message: None,
    pipelines: Pipelines | None = None,
) -> list[EncodedPrompts]:
    """Prompt sets with their embeddings: each text encoded once, and only if the cache lacks it.

    The text encoders are loaded where there is something to encode, and dropped again.

    Raises:
        ValueError: if a set is empty, the model does not load, or the cache cannot be written.
    """
    pipelines = pipelines or cfg.model.pipelines
    root = embedding_cache(cfg.data.cache) if cfg.model.has_files else None
    cache = EmbeddingCache(root, encoder_key(cfg, pipelines)) if root is not None else None
    load = partial(build_backbone, cfg, "text", pipelines=pipelines)
    return encoded_sets(cache, sets, load, notice=progress)


def encoder_key(cfg: RunConfig, pipelines: Pipelines | None = None) -> EncoderKey:
    """What the embeddings of a config's prompts depend on besides their texts."""
    pipeline = (pipelines or cfg.model.pipelines).model
    check_directory(pipeline)
    facts = encoder_facts(
        pipeline,
        dtype=cfg.model.dtype,
        device=device_of(cfg.run.device).type,
        max_sequence_length=cfg.model.max_sequence_length,
        batch_size=BATCH,
    )
    return EncoderKey(cfg.model.path, facts)


def adapter_settings(cfg: RunConfig, backbone: Backbone) -> AdapterSettings:
    chosen = cfg.adapters
    targets = chosen.targets if chosen.targets is not None else backbone.lora_targets()
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        raise ValueError(
            f"adapters.targets {targets!r} is no regular expression: {error}"
        ) from error
    if chosen.targets is not None and not isinstance(targets, str):
        _check_named(targets, backbone)
    return AdapterSettings(
        chosen.rank, chosen.alpha, targets if isinstance(targets, str) else list(targets)
    )


def _check_named(targets: Sequence[str], backbone: Backbone) -> None:
    """Passes names of modules that are all there: PEFT takes a list of which one is.

    Raises:
        ValueError: naming the first that no module has.
    """
    there = [f".{name}" for name, _ in backbone.student_base.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in there):
            raise ValueError(
                f"adapters.targets has {target!r}, but no module of {backbone.family} has that "
                "name (null takes the family's own)"
            )


def fake_scores(cfg: RunConfig) -> int | None:
    """How many fake scores a config asks for: one for each boundary, or one for all (None)."""
    return cfg.sampler.boundaries if cfg.train.fake_scores == "per_boundary" else None


def attention_for(cfg: RunConfig, device: torch.device) -> AbstractContextManager[None]:
    """The attention of what the networks compute in: the autocast type, or that of the base."""
    dtype = autocast_dtype(cfg.model.autocast, device) or DTYPES[cfg.model.dtype]
    return attention_of(device, dtype)


def student_guidance(cfg: RunConfig, backbone: Backbone) -> float | None:
    """What generator and fake score are called with; None is what their network expects.

    Raises:
        ValueError: if that would take a second pass, which a few-step student is to do without.
    """
    asked = cfg.model.student_guidance
    if asked is not None and backbone.passes(asked) > 1:
        raise ValueError(
            f"model.student_guidance {asked:g} is for models that take the scale as an input; this "
            "one's student goes without guidance, so give 1.0 or null"
        )
    return asked


def build_roles(cfg: RunConfig, backbone: Backbone, start: Start | None) -> Roles:
    """Adapters over one base, or separate copies, as `adapters.kind` says.

    Raises:
        ValueError: if what stage 2 starts from does not fit; as `student_guidance`.
    """
    check_grids(cfg, start)
    autocast = autocast_dtype(cfg.model.autocast, backbone.device)
    guidance = student_guidance(cfg, backbone)
    if cfg.adapters.kind == "copies":
        return copy_roles(
            backbone,
            seed=cfg.run.seed,
            few_step=start.few_step if start else None,
            fake_score=start.fake_score if start else None,
            boundaries=fake_scores(cfg),
            checkpointing=cfg.model.checkpointed,
            autocast=autocast,
            guidance=guidance,
        )
    below = None
    if start is not None:
        if start.settings is None:
            raise ValueError(
                "model.few_step was trained with adapters.kind=copies and adapters.kind is lora"
            )
        below = (start.settings, start.few_step)
    settings = adapter_settings(cfg, backbone)
    try:
        return adapter_roles(
            backbone,
            settings,
            seed=cfg.run.seed,
            few_step=below,
            fake_score=start.fake_score if start else None,
            fresh_fake_score=cfg.stage == "tilt" and cfg.tilt.fake_score_start == "fresh",
            boundaries=fake_scores(cfg),
            checkpointing=cfg.model.checkpointed,
            autocast=autocast,
            guidance=guidance,
            init_std=cfg.adapters.init_std,
            graphs=graphs_for(backbone.device, _recorded(cfg, backbone)),
        )
    except ValueError as error:
        if below is None:
            raise
        below_path, model = cfg.model.few_step, cfg.model.path
        raise ValueError(f"model.few_step={below_path} does not fit {model}: {error}") from error


def _recorded(cfg: RunConfig, backbone: Backbone) -> bool:
    """Whether training's passes are recorded: `auto` is wherever nothing speaks against it.

    Raises:
        ValueError: if it is asked for and the model's family reads from the host in its passes.
    """
    model = cfg.model
    able = isinstance(backbone, PipelineBackbone) and backbone.record.graphs
    if model.graphs is True and not able:
        known = ", ".join(graph_families())
        raise ValueError(
            f"model.graphs true is for pipelines of family {known}, not {backbone.family}"
        )
    plain = not model.compile and model.base_storage is None
    free = able and plain and cfg.run.sharding == "replicated"
    return model.graphs is True or (model.graphs == "auto" and free)


def build_stage(
    cfg: RunConfig,
    progress: Callable[[str], None] = lambda message: None,
    *,
    sets: PromptSets | None = None,
    pipelines: Pipelines | None = None,
    ranks: Ranks = ALONE,
) -> Build:
    """Encodes the prompts, loads the rest of the model, and puts one rank's stage together.

    `sets` are the config's prompts, and `pipelines` its directories, where they have been read
    already.

    Raises:
        ValueError: if the batch does not go round the ranks; and whatever does not load.
    """
    share = _share(cfg, ranks)
    sets, pipelines = sets or read_prompts(cfg), pipelines or cfg.model.pipelines
    count = max(
        cfg.log.samples if cfg.log.samples_every else 0,
        cfg.watch.prompts if cfg.watch.rewards else 0,
    )
    chosen = [sets.train, looked_at(cfg, sets)[:count]] if count else [sets.train]
    with ranks.main_first():  # the others find the prompts in the cache
        encoded, *fixed = encode_sets(cfg, chosen, progress, pipelines)
    progress(f"loading {cfg.model.path}")
    backbone = build_backbone(cfg, "image", ranks, pipelines)
    start = starting_point(cfg)
    roles = build_roles(cfg, backbone, start)
    _place(cfg, backbone, roles, ranks)
    lora = cfg.adapters.kind == "lora"
    settings = adapter_settings(cfg, backbone) if lora else None
    stage, running = make_stages(cfg, backbone, encoded, roles, share)
    sizes = buckets_of(cfg, encoded.prompts)
    facts = Facts(
        stage=cfg.stage,
        adapters=settings,
        few_step_adapters=start.settings if start else None,
        steps=cfg.sampler.steps,
        eta=cfg.sampler.eta,
        student_guidance=cfg.model.student_guidance,
        rewards_at_once=stage.rewards.at_once if isinstance(stage, Tilt) else None,
        sizes=tuple(b.size for b in sorted(sizes, key=lambda b: -b.weight)) or None,
        fake_score_continued=continues(cfg, start),
        prompts_spread=spreads(cfg),
    )
    return Build(stage, backbone, encoded, fixed[0] if fixed else None, facts, running)


def _sharded(cfg: RunConfig, ranks: Ranks) -> bool:
    return cfg.run.sharding == "fsdp2" and ranks.size > 1


def _share(cfg: RunConfig, ranks: Ranks) -> Share:
    batch, sharded = cfg.train.batch_size, cfg.run.sharding == "fsdp2"
    if batch < ranks.size:
        raise ValueError(f"train.batch_size {batch} leaves some of {ranks.size} ranks no sample")
    if sharded and batch % ranks.size:
        raise ValueError(
            f"run.sharding=fsdp2 needs a train.batch_size that {ranks.size} ranks divide evenly, "
            f"not {batch}"
        )
    return Share(batch, cfg.train.micro, ranks)


def _place(cfg: RunConfig, backbone: Backbone, roles: Roles, ranks: Ranks) -> None:
    """The same start on every rank, and the networks sharded and compiled as asked for."""
    bases = {id(b): b for b in (backbone.student_base, backbone.teacher_base)}.values()
    if _sharded(cfg, ranks):
        for base in bases:
            shard(base, backbone.device, ranks)
    for role in (roles.generator, roles.fake_score, roles.ema):
        ranks.copy_from_main(list(role.parameters.values()))
    if cfg.model.compile:
        every = [roles.teacher, roles.generator, roles.fake_score, roles.ema, roles.reference]
        singles = [one for role in every if role for one in role.singles]
        for network in {id(role.network): role.network for role in singles}.values():
            blocks = backbone.record.blocks if isinstance(backbone, PipelineBackbone) else ()
            again = cfg.stage == "tilt" and cfg.tilt.keep_graph is True
            compile_blocks(network, repeated=blocks, again=again)
