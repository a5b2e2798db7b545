"""The interval of scores that are all 0 or 1: a share's, also where prompts repeat."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tiltflow.evaluation.figures import around
from tiltflow.evaluation.seeds import over_seeds
from tiltflow.evaluation.statistics import mean_ci, paired_comparison, proportion_ci, score_ci


def test_a_share_is_wilsons_where_no_prompt_repeats_and_covers_where_they_do() -> None:
    wilson = stats.binomtest(37, 50).proportion_ci(0.95, method="wilson")
    hits = [1.0] * 37 + [0.0] * 13
    for clusters in (None, list(range(50)), ["one"] * 50):
        found = proportion_ci(hits, clusters=clusters)
        assert found == pytest.approx((0.74, wilson.low, wilson.high))
    # ten votes on each of five pairs, all decided alike: five, not fifty
    share, low, high = proportion_ci([1.0] * 50, clusters=[i // 10 for i in range(50)])
    assert share == 1 and low < 0.5 and high == 1
    rng, groups, covered = np.random.default_rng(8), [i // 4 for i in range(120)], [0, 0]
    for _ in range(600):
        rates = np.repeat(rng.beta(0.8, 0.4, 30), 4)  # 2/3 on average, prompts far apart
        hits = (rng.random(120) < rates).astype(float)
        for known, clusters in enumerate((None, groups)):
            _, low, high = proportion_ci(hits, clusters=clusters)
            covered[known] += low <= 2 / 3 <= high
    assert covered[0] / 600 < 0.88 and 0.93 <= covered[1] / 600 <= 0.99


def test_the_mean_of_hits_and_misses_is_a_share() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    assert score_ci([1.0] * 80) == pytest.approx((1, 80 / (80 + z2), 1))  # Wilson's; t had no width
    hits = [1.0] * 79 + [0.0]
    assert score_ci(hits) == proportion_ci(hits) and score_ci(hits)[2] < 1
    soft = [0.5, *hits]
    assert score_ci(soft) == mean_ci(soft)
    found = paired_comparison(hits, [1.0] * 80)  # a difference is none
    assert found.ci95 == mean_ci(np.array(hits) - 1)[1:]
    middle = [1.0] * 300 + [0.0] * 212
    assert score_ci(middle)[1:] == pytest.approx(mean_ci(middle)[1:], abs=0.001)


def test_a_share_of_clusters_at_an_end_counts_them_and_not_their_images() -> None:
    """Four images of each of 64 prompts. All right: 64 hits. One wrong: that one image, and the
    z²/2 that Wilson's takes for granted, of which each is taken to be a prompt's four."""
    groups, z2 = [i // 4 for i in range(256)], stats.norm.ppf(0.975) ** 2
    ratio = z2 / stats.t.ppf(0.975, 63) ** 2
    low = proportion_ci([1.0] * 256, clusters=groups)[1]
    assert low == pytest.approx(1 / (1 + z2 / (64 * ratio)))
    one = [1.0] * 255 + [0.0]
    error = stats.sem([1.0] * 63 + [0.75])
    found = 256 * error**2 / (255 / 256 / 256)
    n = 256 / ((found + 4 * z2 / 2) / (1 + z2 / 2)) * ratio
    half = (z2 / n * (255 / 256**2) + (z2 / n) ** 2 / 4) ** 0.5 / (1 + z2 / n)
    below, above = proportion_ci(one, clusters=groups)[1:]
    assert (above - below) / 2 == pytest.approx(half)


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.6, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("kind", ["alike", "free", "between"])
def test_the_interval_of_a_share_has_its_coverage(rate: float, images: int, kind: str) -> None:
    """Images of a prompt that are all alike, independent, or of a rate of the prompt's own."""
    rng = np.random.default_rng(11)
    count, covered, of_t = 256 // images, 0, 0
    groups = np.repeat(np.arange(count), images).tolist()
    for _ in range(600):
        rates = np.full(count, rate)
        if kind == "between":
            rates = rng.beta(0.8 * rate, 0.8 * (1 - rate), count)
        alike = rng.random(count) < rates
        free = rng.random((count, images)) < rates[:, None]
        hits = (np.repeat(alike, images) if kind == "alike" else free.ravel()).astype(float)
        low, high = score_ci(hits, clusters=groups)[1:]
        covered += low <= rate <= high
        low, high = mean_ci(hits, clusters=groups)[1:]
        of_t += low <= rate <= high
    assert covered / 600 >= 0.93
    if rate == 0.99 and kind == "alike":
        assert of_t / 600 < 0.95 * covered / 600


def test_a_share_over_seeds_is_of_prompts() -> None:
    """Seeds that agree are no more prompts, and one seed is the share itself."""
    hits = np.array([1.0] * 79 + [0.0])
    one, two = over_seeds({0: hits}), over_seeds({0: hits, 1: hits})
    assert tuple(one["ci95"]) == proportion_ci(hits)[1:]
    assert two["mean"] == one["mean"] and two["ci95"] == pytest.approx(one["ci95"], abs=0.002)
    assert over_seeds({0: hits * 0 + 1, 1: hits * 0 + 1})["ci95"][0] < 0.96
    soft = {0: hits * 0.5, 1: hits}
    assert tuple(over_seeds(soft)["ci95"]) == mean_ci(hits * 0.75)[1:]


def test_what_stands_behind_a_mean() -> None:
    assert around(0.582, [0.535, 0.629], 3) == "±0.047"
    assert around(0.582, [0.5345, 0.628], 3, "± ") == "± 0.047"
    assert around(0.99, [0.946, 0.998], 3) == "[0.946, 0.998]"
    assert around(1.0, [1.0, 1.0], 3) == "±0.000"
