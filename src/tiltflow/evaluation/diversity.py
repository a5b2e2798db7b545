"""How different several images of one prompt are, in some feature space."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean cosine distance over all pairs in each group: (G, N, D) to (G,) in [0, 2], N >= 2.

    0 when all images of a group have the same direction, 1 when they are orthogonal.
    """
    kernel = _cosines(features)
    n = kernel.shape[-1]
    pairs = (kernel.sum((1, 2)) - kernel.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))
    return (1 - pairs).to(torch.float32)


def vendi_score(features: Tensor) -> Tensor:
    """The Vendi score, an effective number of different images: (G, N, D) to (G,) in [1, N].

    exp of the entropy of the eigenvalues of K/N, K the cosine kernel (Friedman and Dieng, 2023).
    """
    kernel = _cosines(features)
    values = torch.linalg.eigvalsh(kernel / kernel.shape[-1]).clamp_min(0)  # rounding below 0
    return torch.exp(-torch.special.xlogy(values, values).sum(-1)).to(torch.float32)


def _cosines(features: Tensor) -> Tensor:
    """The cosine similarities (G, N, N) in fp64 of features (G, N, D)."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(
            "diversity needs groups of two or more features, (G, N, D), "
            f"got {tuple(features.shape)}"
        )
    features = features.to(torch.float64)
    norms = features.norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise ValueError("diversity needs finite features that are not zero")
    unit = features / norms
    cosines: Tensor = unit @ unit.transpose(1, 2)
    return cosines
