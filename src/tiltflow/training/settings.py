"""What training may be told: the sections `train`, `cold_start` and `tilt` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tiltflow.core.limits import MOST_SAMPLES, MOST_STEPS
from tiltflow.core.settings import (
    Beta,
    Count,
    Positive,
    Rate,
    Samples,
    Section,
    Steps,
    Text,
    Weight,
)

Options = dict[Text, Any]
"""Settings of a component from outside, which it checks itself."""


class TrainConfig(Section):
    """`batch_size` is global (stage 2: samples a rollout), `micro_batch_size` a rank's; `auto` is
    what makes the fastest plan that fits the device (`tasks.planning`).

    `fake_scores`: one for the samples of all boundaries, as published, or one for each boundary.
    `boundary_power` p: the matching gradient at level s counts (1 − s)^−p times; 0 as published.
    `skip_nonfinite` is how many steps a run may skip for a non-finite number before it stops.
    `fake_score_weight_decay`: null is `weight_decay`. `ema_…`: `training/averaging.py`.
    """

    steps: Positive
    batch_size: Samples
    micro_batch_size: Samples | Literal["auto"] | None = None
    generator_lr: Rate
    fake_score_lr: Rate
    fake_scores: Literal["shared", "per_boundary"] = "shared"
    boundary_power: Weight = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Weight = 0.0
    fake_score_weight_decay: Weight | None = None
    clip: Rate = 1.0
    ema: Beta = 0.99
    ema_every: Literal["update", "iteration"] = "update"
    ema_warmup: bool = False
    ema_interval: Positive = 1
    ema_repeats: Positive = 1
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Count = 0
    skip_nonfinite: Count = 0

    @property
    def micro(self) -> int:
        """Samples that go through a network at once: all, or at most `micro_batch_size`; all while
        `auto` is open."""
        chosen = None if self.micro_batch_size == "auto" else self.micro_batch_size
        return min(chosen or self.batch_size, self.batch_size)


class ColdStartConfig(Section):
    """METHOD §4; `consistency_max_delta` is in thousandths of σ.

    `reuse` is how many iterations one rollout serves: 1 as published, at most K.
    `keep_graph`: the step that the generator's update differentiates is run once, and its graph
    kept while the fake score is updated.
    `fresh_boundary`: the generator's update has boundary samples of its own.
    `boundary_order`: the boundary of an iteration is drawn, as published, or that of a phase of
    `phase` iterations, the first boundary's first and the last's to the end (arXiv 2510.27684).
    `objective`: what the generator follows at its boundary samples, by name or as a dotted path
    (`training/objective.py`); `objective_options` are its settings.
    """

    generator_every: Positive = 10
    fresh_boundary: bool = False
    reuse: Steps = 1
    keep_graph: bool = False
    boundary_order: Literal["random", "phased"] = "random"
    phase: Positive = 1000
    consistency: Weight = 0.01
    consistency_form: Literal["two_sample", "one_sample"] = "two_sample"
    consistency_max_delta: Annotated[int, Field(ge=1, le=1000)] = 200
    objective: Text = "ac_dmd"
    objective_options: Options = Field(default_factory=dict)


class TiltConfig(Section):
    """METHOD §5: the weights and choices of stage 2."""

    group_size: Annotated[int, Field(ge=2, le=MOST_SAMPLES)] = 24
    """G, the samples of one prompt."""
    subset: Steps = 2
    """M, the stochastic steps that the policy gradient trains."""
    subset_order: Literal["random", "window"] = "random"
    """Which M: drawn each epoch, as published, or a window of successive ones (`window_steps`)."""
    window_every: Positive = 25
    """Epochs after which the window moves on by a step."""
    clip_range: Rate = 1e-5
    advantage_clip: Rate = 5.0
    kl: Weight = 0.0
    """β_KL."""
    log_prob: Literal["unit", "gaussian"] = "unit"
    kl_form: Literal["unit", "gaussian"] | None = None
    """The KL's convention where it is not `log_prob`'s (`policy_kl`)."""
    policy_reduction: Literal["mean", "sum"] = "mean"
    """SubGRPO's part of the loss: the mean over the M trained steps; or their "sum", as published,
    and then every term is divided by M + 1."""
    merge_same_prompts: bool = False
    """Whether groups of the same prompt text have their mean, for the advantages, together."""
    drop_zero_advantages: bool = False
    """Whether samples that no reward tells from their group are left out of all terms of the
    generator's loss, which are means over the others (`standing_out`)."""
    round_images: bool = False
    """Whether scores are of images in 8 bits; the reward's gradient is at the image as decoded."""
    keep_graph: bool | Literal["auto"] = False
    """Whether the rollout keeps the graphs of the steps that the generator's update differentiates;
    else they run once more for it. A pass less for each, for the memory of the batch's graphs; the
    gradient through several steps is then added up in another order. `auto` where
    `gradient_checkpointing=auto` finds the memory for it."""
    policy_weight: Weight = 1.0
    matching_weight: Weight = 1e-3
    reward_weight: Weight = 1e-4
    reward_target: float = 3.0
    reward_steps: Steps = 1
    """How many of the last steps the reward is back-propagated through; SubGRPO has the others."""
    reward_normalise: bool = False
    """Whether every sample's reward gradient counts alike, at x̂₀ and on its way back; as published,
    as it comes."""
    decode_chunk: Samples | None = None
    """Samples in a decoder and in a reward model at a time; null is a micro-batch."""
    match_steps: Literal["last", "random", "all"] = "last"
    fake_score_start: Literal["continued", "fresh"] = "continued"
    """Stage 1's fake score trained on, or frozen under a fresh adapter."""
    fake_score_updates: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 1
    """An epoch; 0 where nothing asks the fake score."""
    consistency: Weight = 0.01
    consistency_form: Literal["two_sample", "one_sample"] = "two_sample"
    consistency_max_delta: Annotated[int, Field(ge=1, le=1000)] = 200
    terms: dict[Text, Options] = Field(default_factory=dict)
    """Further terms of the generator's loss, by name or as dotted paths (`training/terms.py`), each
    with its settings."""
