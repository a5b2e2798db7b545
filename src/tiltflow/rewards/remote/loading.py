"""The rewards that another process computes, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltflow.rewards.base import Reward
from tiltflow.rewards.ranking import Ranker
from tiltflow.rewards.remote.address import JUDGE, remote_settings
from tiltflow.rewards.remote.asking import judge_settings, refuse_ranks


def load_elsewhere(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward `remote:…` or `judge:…`.

    Raises:
        ValueError: as `RemoteReward`, `PooledReward` or `Judge`, and if it has ranks in place of
            scores.
    """
    refuse_ranks(name, options)
    if name.startswith(JUDGE):
        from tiltflow.rewards.zoo.judge import Judge

        return Judge(name, judge_settings(name, options))
    settings = remote_settings(name, options)
    if settings.servers is not None:
        from tiltflow.rewards.remote.pool import PooledReward

        return PooledReward(name, settings)
    from tiltflow.rewards.remote.client import RemoteReward

    return RemoteReward(name, settings)


def load_ranker(name: str, options: Mapping[str, Any]) -> Ranker:
    """The `judge:…` whose form is pairs or group.

    Raises:
        ValueError: as `GroupJudge`.
    """
    from tiltflow.rewards.zoo.judge import GroupJudge

    return GroupJudge(name, judge_settings(name, options))
