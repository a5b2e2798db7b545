"""The rewards that another process computes, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltflow.rewards.base import Reward
from tiltflow.rewards.remote.address import JUDGE, remote_settings
from tiltflow.rewards.remote.asking import judge_settings


def load_elsewhere(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward `remote:…` or `judge:…`.

    Raises:
        ValueError: as `RemoteReward`, `PooledReward` or `Judge`.
    """
    if name.startswith(JUDGE):
        from tiltflow.rewards.zoo.judge import Judge

        return Judge(name, judge_settings(name, options))
    settings = remote_settings(name, options)
    if settings.servers is not None:
        from tiltflow.rewards.remote.pool import PooledReward

        return PooledReward(name, settings)
    from tiltflow.rewards.remote.client import RemoteReward

    return RemoteReward(name, settings)
