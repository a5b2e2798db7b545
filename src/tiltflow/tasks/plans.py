"""What a recipe holds in memory, from configurations alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from tiltflow.config.load import RewardConfig, RunConfig
from tiltflow.core.paths import resolve_path
from tiltflow.data.embeddings import BATCH
from tiltflow.models.adapters import AdapterSettings
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.meta import text_encoders
from tiltflow.setup.build import DTYPES, adapter_settings, fake_scores
from tiltflow.setup.model_checks import largest, meta_of
from tiltflow.setup.planner import Job, Plan, Planner, TiltJob
from tiltflow.training.own_terms import most_passes

OF_IMAGE = 0.21
"""The share of a ViT-L's weights that the graph of one image takes in fp32; of a ViT-H's .15."""


class Plans:
    """What a recipe and variants of it will hold in memory, reward models included, from
    configurations alone: on one of `ranks` devices, which has its share of the batch and a base
    of its own (`run.sharding` is not planned). A variant has other micro-batches, or recomputes or
    keeps other parts: what it has in common with those before is made once.

    Raises:
        ValueError: if there is no directory of the pipeline and it is no published one; as
            `reward_memory`.
    """

    def __init__(self, cfg: RunConfig, ranks: int = 1) -> None:
        self.cfg, self.ranks = cfg, ranks

    def __call__(self, cfg: RunConfig) -> Plan:
        made, (models, _) = self._planner.plan(self._job(cfg)), self.models
        if not models:
            return made
        scoring = made.phases.get("scoring", 0) + _working(self.cfg, models)
        phases = {**made.phases, "scoring": scoring}
        return replace(made, held={**made.held, **models}, phases=phases)

    @cached_property
    def models(self) -> tuple[dict[str, int], list[str]]:
        """As `reward_models`."""
        return reward_models(self.cfg)

    def _make(self) -> PipelineBackbone:
        return meta_of(self.cfg, resolution=largest(self.cfg))

    @cached_property
    def _backbone(self) -> PipelineBackbone:
        return self._make()

    @cached_property
    def _planner(self) -> Planner:
        encoders = text_encoders(resolve_path(self.cfg.model.path))
        numbers = encoding_numbers(self._backbone, encoders)
        return Planner(self._make, numbers * DTYPES[self.cfg.model.dtype].itemsize)

    def _job(self, cfg: RunConfig) -> Job:
        model = cfg.model
        lora = cfg.adapters.kind == "lora"
        settings = adapter_settings(cfg, self._backbone) if lora else None
        chosen = cfg.tilt if cfg.stage == "tilt" else cfg.cold_start
        return Job(
            batch=(rows := -(-cfg.train.batch_size // self.ranks)),
            micro=min(cfg.train.micro, rows),
            steps=cfg.sampler.most,
            guidance=self._backbone.guidance if model.guidance is None else model.guidance,
            consistency=chosen.consistency_form if chosen.consistency > 0 else None,
            adapters=settings,
            checkpointing=model.checkpointed,
            tilt=_tilt_job(cfg, settings) if cfg.stage == "tilt" else None,
            fused=cfg.run.device != "cpu",
            boundaries=fake_scores(cfg),
            keep_graph=chosen.keep_graph is True,
            negatives=cfg.data.columns.negative is not None,
        )


def _pulled(cfg: RunConfig) -> int:
    """Through how many of stage 2's last steps rewards are back-propagated."""
    backprop = cfg.tilt.reward_weight > 0 and any(r.backprop for r in cfg.rewards.values())
    return cfg.tilt.reward_steps if backprop else 0


def differentiated(cfg: RunConfig) -> int:
    """Through how many sampler steps stage 2's update of the generator goes at most: those that the
    policy gradient trains, that rewards go back through, and where the teacher is matched."""
    tilt, steps = cfg.tilt, cfg.sampler.most
    trained, pulled = tilt.subset if tilt.policy_weight else 0, _pulled(cfg)
    where = tilt.match_steps if tilt.matching_weight else "last"
    found = {"last": max(pulled, 1), "random": pulled + 1, "all": steps}[where]
    return min(trained + found, steps)


def _tilt_job(cfg: RunConfig, settings: AdapterSettings | None) -> TiltJob:
    chunk = cfg.tilt.decode_chunk or cfg.train.micro
    fresh, graphs = cfg.tilt.fake_score_start == "fresh", differentiated(cfg)
    own = most_passes(cfg.tilt.terms, cfg.sampler.most)
    return TiltJob(cfg.tilt.group_size, chunk, _pulled(cfg), settings, fresh, graphs, own)


def plan_recipe(cfg: RunConfig) -> Plan:
    """The plan of one recipe (`Plans`)."""
    return Plans(cfg)(cfg)


def encoding_numbers(backbone: PipelineBackbone, encoders: Mapping[str, nn.Module]) -> int:
    """How many numbers are in memory while a batch of prompts is encoded: the encoders' weights,
    what comes out, and of an encoder that is asked for them the states of every layer."""
    rows = 1 if backbone.ragged else BATCH
    weights = sum(p.numel() for encoder in encoders.values() for p in encoder.parameters())
    made = rows * sum(map(math.prod, backbone.conditioning_shapes().values()))
    states = [0]
    for name in backbone.record.keeps_states:
        if name in encoders:
            outer: Any = encoders[name].config
            config = getattr(outer, "text_config", outer)
            tokens = min(backbone.sequence, config.max_position_embeddings)
            states.append(rows * tokens * config.hidden_size * (config.num_hidden_layers + 1))
    return weights + made + max(states)  # one encoder after the other


def reward_models(cfg: RunConfig) -> tuple[dict[str, int], list[str]]:
    """The bytes of the weights of the reward models that a run loads, by what they are, and the
    rewards whose size is not known before they load.

    Raises:
        ValueError: as `reward_memory`.
    """
    # with every kind of reward model, which a run without a plan need not wait for
    from tiltflow.rewards.sizes import reward_memory

    held, unknown = {}, []
    for kind, table in _tables(cfg).items():
        for name, size in reward_memory(table).items():
            if size is None:
                unknown.append(f"{kind} {name}")
            elif size:
                held[f"{kind} {name}"] = size
    return held, unknown


def _tables(cfg: RunConfig) -> dict[str, dict[str, RewardConfig]]:
    """The rewards that a run loads, by what they are for, and the CLIP that diversity is measured
    in, where it is one of its own."""
    watch = cfg.watch
    tables = {"reward": cfg.rewards, "watched reward": watch.rewards}
    if watch.rewards and cfg.stage == "tilt" and watch.clip is not None:
        tables["watch.clip"] = {"clipscore": RewardConfig(weight=0, path=watch.clip)}
    return tables


def _working(cfg: RunConfig, models: Mapping[str, int]) -> int:
    """What the largest of the reward models computes with, one after the other: as much again as
    its weights, which is a round figure, or the graph of the images that it gets at once."""

    def of(size: int, at_once: object) -> float:
        return size * max(1.0, OF_IMAGE * at_once if isinstance(at_once, int) else 0.0)

    return int(
        max(
            of(models.get(f"{kind} {name}", 0), reward.options.get("at_once", 1))
            for kind, table in _tables(cfg).items()
            for name, reward in table.items()
        )
    )
