"""Rewards: what they are, the builtin ones, and weighted sets of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltflow.rewards.base import FunctionReward, Reward, checked, load_reward
    from tiltflow.rewards.combine import RewardMixture, Weighted

__all__ = ["FunctionReward", "Reward", "RewardMixture", "Weighted", "checked", "load_reward"]
_OF_COMBINE = {"RewardMixture", "Weighted"}


# The command line reads a server's address from `rewards.remote` before anything heavy may load.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "combine" if name in _OF_COMBINE else "base"
    return getattr(import_module(f"{__name__}.{home}"), name)
