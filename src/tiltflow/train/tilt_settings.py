"""What stage 2 may be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TiltSettings:
    """The weights and choices of METHOD §5; `subset` is M, `group_size` G, `kl` β_KL."""

    group_size: int
    subset: int
    clip_range: float = 1e-5
    advantage_clip: float = 5.0
    kl: float = 0.0
    log_prob: str = "unit"
    policy_weight: float = 1.0
    matching_weight: float = 1e-3
    reward_weight: float = 1e-4
    reward_target: float = 3.0
    match_steps: str = "last"
    fake_score_updates: int = 1
    decode_chunk: int = 16
    reward_steps: int = 1
    """How many of the last steps the reward is back-propagated through; SubGRPO has the others."""
    reward_normalise: bool = False
    """Whether every sample's reward gradient counts alike, at x̂₀ and on its way back."""
    policy_reduction: str = "mean"
    """SubGRPO's part of the loss: the mean over the M trained steps; or their "sum", as published,
    and then every term is divided by M + 1."""
    kl_form: str | None = None
    """The KL's convention where it is not `log_prob`'s (`policy_kl`)."""
    merge_same_prompts: bool = False
    """Whether groups of the same prompt text have their mean, for the advantages, together."""
    drop_zero_advantages: bool = False
    """Whether samples that no reward tells from their group are left out of all three terms of the
    generator's loss, which are means over the others (`standing_out`)."""
    round_images: bool = False
    """Whether scores are of images in 8 bits; the reward's gradient is at the image as decoded."""
    keep_graph: bool = False
    """Whether the rollout keeps the graphs of the steps that the generator's update differentiates;
    else they run once more for it. A pass less for each, for the memory of the batch's graphs."""
