"""The rewards that a model or another process outside of training's own code computes, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiltflow.rewards.base import Reward
from tiltflow.rewards.questions import Model
from tiltflow.rewards.ranking import Ranker
from tiltflow.rewards.remote.asking import (
    JudgeSettings,
    judge_settings,
    refuse_ranks,
    settings_elsewhere,
)


def load_elsewhere(
    name: str,
    options: Mapping[str, Any],
    path: str | None = None,
    device: str | torch.device = "cpu",
) -> Reward:
    """The reward `remote:…` or `judge:…`; a judge with a `path` runs on `device`.

    Raises:
        ValueError: as `RemoteReward`, `PooledReward`, `Judge`, `Endpoint` or `LocalModel`, and if
            it has ranks in place of scores.
    """
    refuse_ranks(name, options)
    settings = settings_elsewhere(name, options, path)
    if isinstance(settings, JudgeSettings):
        from tiltflow.rewards.zoo.judge import Judge

        return Judge(name, settings, _model(name, settings, path, device))
    if settings.servers is not None:
        from tiltflow.rewards.remote.pool import PooledReward

        return PooledReward(name, settings)
    from tiltflow.rewards.remote.client import RemoteReward

    return RemoteReward(name, settings)


def load_ranker(
    name: str,
    options: Mapping[str, Any],
    path: str | None = None,
    device: str | torch.device = "cpu",
) -> Ranker:
    """The `judge:…` whose form is pairs or group.

    Raises:
        ValueError: as `GroupJudge`, `Endpoint` or `LocalModel`.
    """
    from tiltflow.rewards.zoo.judge import GroupJudge

    settings = judge_settings(name, options, path)
    return GroupJudge(name, settings, _model(name, settings, path, device))


def _model(
    name: str, settings: JudgeSettings, path: str | None, device: str | torch.device
) -> Model:
    if path is not None:
        from tiltflow.rewards.zoo.judge_local import LocalModel

        return LocalModel(name, settings, path, device)
    from tiltflow.rewards.remote.endpoint import Endpoint

    return Endpoint(name, settings)
