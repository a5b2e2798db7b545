"""The adversarial losses of DMD2 (arXiv 2405.14867): logits D of samples that were re-noised.

log D(F(x, t)) and −log D(F(G(z), t)) of the paper, with D = sigmoid of a logit: non-saturating.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def realism_loss(logits: Tensor) -> Tensor:
    """−log sigmoid(logit), what the generator descends: the shape of `logits`."""
    return softplus(-logits)


def unreality_loss(logits: Tensor) -> Tensor:
    """−log(1 − sigmoid(logit)), what the discriminator descends on the generator's samples."""
    return softplus(logits)
