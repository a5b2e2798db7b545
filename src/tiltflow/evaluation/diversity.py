"""How different images are in some feature space: those of one prompt, and those of two systems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tiltflow.models.medium import Features, Medium
from tiltflow.rewards.base import Reward


def features_of(medium: Medium, rewards: Iterable[Reward]) -> Features | None:
    """What samples are compared in: the medium's own features, else those of the last reward that
    has `image_features` (a CLIP); None without one."""
    if medium.features is not None:
        return medium.features
    given = list(rewards)
    clip = last_clip(given)
    return None if clip is None else getattr(given[clip], "image_features")  # noqa: B009


def last_clip(rewards: Sequence[Reward]) -> int | None:
    """The place of the last reward that has `image_features`; None where none has."""
    clips = [i for i, reward in enumerate(rewards) if hasattr(reward, "image_features")]
    return clips[-1] if clips else None


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


CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""The kernel's width and the factor that CMMD is reported with (google-research, cmmd/distance.py).
"""


def cmmd(x: Tensor, y: Tensor, block: int = 1024) -> float:
    """The squared maximum mean discrepancy of two sets of unit features, (N, D) and (M, D), under
    a Gaussian kernel, times 1,000: 0 for the same set, and larger the more they differ.

    Jayasumana et al., "Rethinking FID" (2024), with its width and in its biased form: under
    equal distributions it is above 0, by about 10 (1/N + 1/M) (1 − the mean cosine). Published
    figures use CLIP ViT-L/14 at 336 pixels; under another CLIP only figures of one and the same
    can be compared.

    Raises:
        ValueError: if a set is empty, not finite, or the widths D differ.
    """
    for features in (x, y):
        if features.ndim != 2 or not len(features) or features.shape[1] != x.shape[1]:
            raise ValueError(f"CMMD needs (N, D) and (M, D), got {(*x.shape,)} and {(*y.shape,)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("CMMD needs finite features")
    x, y = x.to(torch.float64), y.to(torch.float64)
    between = _mean_kernel(x, y, block)
    return CMMD_SCALE * (_mean_kernel(x, x, block) + _mean_kernel(y, y, block) - 2 * between)


def _mean_kernel(x: Tensor, y: Tensor, block: int) -> float:
    """The mean of k(x, y) − 1, whose ones cancel in the sum above: all digits are kept."""
    total = 0.0
    for rows in x.split(block):
        squared = rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T
        total += float(torch.expm1(-squared.clamp_min(0) / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))


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
