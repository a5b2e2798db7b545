"""Rewards: what they are, the builtin ones, and weighted sets of them."""

from tiltflow.rewards.base import FunctionReward, Reward, checked, load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted

__all__ = ["FunctionReward", "Reward", "RewardMixture", "Weighted", "checked", "load_reward"]
