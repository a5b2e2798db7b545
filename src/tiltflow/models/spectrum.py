"""High-frequency energy of images: rises with grids and noise, falls with blur."""

from __future__ import annotations

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOOR = 1e-6
"""Added before the logarithm: about the variance of rounding to eight bits, (1/255)²/12."""


def high_frequency_energy(images: Tensor, cutoff: float) -> Tensor:
    """Energy above `cutoff` of images (B, 3, H, W) in [0, 1]: (B,) fp64, a mean square a pixel.

    The energy is that of the coefficients of the orthonormal DCT-II whose radial frequency
    sqrt((i/2H)² + (j/2W)²) exceeds `cutoff`, in cycles a pixel; by Parseval all coefficients
    together give the mean square of the pixels. The DCT continues an image by its mirror image,
    so the borders, unlike a Fourier transform's, add no energy of their own.

    Raises:
        ValueError: if the images are not (B, 3, H, W) or the cutoff is not in (0, 0.5).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"high-frequency energy needs (B, 3, H, W), got {tuple(images.shape)}")
    if not 0 < cutoff < 0.5:
        raise ValueError(f"the cutoff frequency must lie in (0, 0.5) cycles a pixel, not {cutoff}")
    height, width = images.shape[-2:]
    rows, columns = np.arange(height) / (2 * height), np.arange(width) / (2 * width)
    above = np.hypot(rows[:, None], columns[None]) > cutoff
    energies = [_energy(image, above) for image in images.detach().double().cpu().numpy()]
    return torch.tensor(energies, dtype=torch.float64)


def _energy(image: NDArray[np.float64], above: NDArray[np.bool_]) -> float:
    """The energy of one image (3, H, W) in the coefficients where `above` (H, W) holds."""
    coefficients = scipy.fft.dctn(image, axes=(1, 2), norm="ortho")
    return float((coefficients[:, above] ** 2).sum() / image.size)
