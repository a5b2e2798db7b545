"""The method: rollouts, and the losses over them.

Losses take tensors and callables, and give per-sample losses (B,) and detached metrics.
"""
