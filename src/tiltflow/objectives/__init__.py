"""The losses: tensors and callables in, per-sample losses (B,) and detached metrics out."""
