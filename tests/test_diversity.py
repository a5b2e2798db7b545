from __future__ import annotations

import math

import pytest
import torch

from tiltflow.evaluation.diversity import cmmd, pairwise_distance, vendi_score

SAME = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]])
SQUARE = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])


def test_pairwise_distance_by_hand() -> None:
    # The square's pairs are at cosine distances 1, 2 and 1; lengths do not count.
    found = pairwise_distance(torch.stack([SAME, SQUARE]))
    torch.testing.assert_close(found, torch.tensor([0.0, 4 / 3]), atol=1e-6, rtol=0)


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    features = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity
    for group, found in zip(features, pairwise_distance(features), strict=True):
        pairs = [1 - cosine(group[i], group[j], dim=0) for i in range(5) for j in range(i)]
        torch.testing.assert_close(found, torch.stack(pairs).mean(), atol=1e-6, rtol=0)


def test_vendi_score_counts_different_images() -> None:
    two_of_four = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])
    groups = torch.stack([torch.eye(4), two_of_four, torch.ones(4, 4)])
    torch.testing.assert_close(vendi_score(groups), torch.tensor([4.0, 2.0, 1.0]))
    # Three of one kind and one of another: the entropy of (3/4, 1/4).
    uneven = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(vendi_score(uneven)) == pytest.approx(math.exp(entropy), rel=1e-6)


@pytest.mark.parametrize(
    "features", [torch.ones(2, 1, 3), torch.ones(2, 3), torch.zeros(1, 2, 3), SAME[None] / 0]
)
def test_diversity_refuses(features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="diversity needs"):
        pairwise_distance(features)
    with pytest.raises(ValueError, match="diversity needs"):
        vendi_score(features)


def test_cmmd_by_hand() -> None:
    """Three vectors at right angles: squared distance 2, so k = exp(−2/200) off the diagonal."""
    x, y = torch.eye(3)[:2], torch.eye(3)[2:]
    k = math.exp(-0.01)
    expected = 1000 * ((1 + k) / 2 + 1 - 2 * k)
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x) == 0
    x = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(30, 8) + 0.5, dim=-1)
    assert cmmd(x, y, block=7) == pytest.approx(cmmd(y, x), rel=1e-9)
    assert cmmd(x, y) > cmmd(x[:25], x[25:]) > 0


@pytest.mark.parametrize(
    "other", [torch.zeros(0, 3), torch.ones(2, 4), torch.ones(3), torch.ones(2, 3) / 0]
)
def test_cmmd_refuses(other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="CMMD needs"):
        cmmd(torch.eye(3), other)
