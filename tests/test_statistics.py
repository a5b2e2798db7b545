from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tiltflow.evaluation.files import write_evaluation
from tiltflow.evaluation.scores import Diversity, System, compare, evaluate_systems
from tiltflow.evaluation.statistics import (
    bootstrap_ci,
    holm,
    mean_ci,
    paired_comparison,
    proportion_ci,
)
from tiltflow.rewards import FunctionReward

# --- intervals and tests ----------------------------------------------------------------------


def test_mean_interval_has_its_coverage() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        _, low, high = mean_ci(rng.normal(3, 2, 15))
        hits += low <= 3 <= high
    assert 0.93 <= hits / 1000 <= 0.97


def test_mean_interval_by_hand() -> None:
    mean, low, high = mean_ci([1.0, 2.0, 3.0])
    half = 4.302653 / np.sqrt(3)  # t(.975, 2), a standard deviation of 1
    np.testing.assert_allclose([mean, low, high], [2, 2 - half, 2 + half], rtol=1e-6)


def test_paired_comparison_is_scipys_t_test() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    ours, theirs = paired_comparison(a, b), stats.ttest_rel(a, b)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-10)
    interval = theirs.confidence_interval(0.95)
    assert ours.ci95 == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert ours.difference == pytest.approx((a - b).mean())
    assert (ours.n, ours.win_rate, ours.test) == (40, (a > b).mean(), "paired t")
    flipped = paired_comparison(b, a)
    assert flipped.difference == -ours.difference and flipped.p_value == ours.p_value


def test_paired_comparison_keeps_its_error_rate() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 5, (1000, 20))  # a prompt's difficulty, which pairing takes out
    a, b = shared + rng.normal(0, 1, shared.shape), shared + rng.normal(0, 1, shared.shape)
    p = [paired_comparison(x, y).p_value for x, y in zip(a, b, strict=True)]
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.06
    moved = [paired_comparison(x + 1, y).p_value for x, y in zip(a, b, strict=True)]
    assert np.mean(np.array(moved) < 0.05) > 0.7


def test_images_of_one_prompt_are_no_independent_draws_of_prompts() -> None:
    """Three images of each of 40 prompts that differ: the plain interval is too short for other
    prompts, and its test too sure; what is said with the prompts named is not."""
    rng = np.random.default_rng(7)
    texts = [f"prompt {i // 3}" for i in range(120)]
    covered, plain, false, short = 0, 0, 0, []
    for _ in range(1000):
        values = np.repeat(rng.normal(0, 1, 40), 3) + rng.normal(0, 0.7, 120)
        found = paired_comparison(values, np.zeros(120), texts)
        covered += found.ci95[0] <= 0 <= found.ci95[1]
        false += found.p_value < 0.05
        low, high = mean_ci(values)[1:]
        plain += low <= 0 <= high
        short.append((high - low) / (found.ci95[1] - found.ci95[0]))
    assert 0.93 <= covered / 1000 <= 0.97 and 0.03 <= false / 1000 <= 0.07
    assert plain / 1000 < 0.85 and np.mean(short) < 0.75
    low, high = bootstrap_ci(values, 0, clusters=texts)
    assert high - low == pytest.approx(np.subtract(*found.ci95[::-1]), rel=0.1)
    alone = mean_ci(values[:10], clusters=["one"] * 10)
    assert alone == mean_ci(values[:10], clusters=range(10)) == mean_ci(values[:10])
    with pytest.raises(ValueError, match="2 clusters for 10 scores"):
        mean_ci(values[:10], clusters=["a", "b"])


def test_the_cluster_robust_error_by_hand() -> None:
    """(1, 3), (2,), (6,): the mean 3, the sums of deviations −2, −1, 3, of three prompts."""
    mean, low, high = mean_ci([1.0, 3.0, 2.0, 6.0], clusters=["a", "a", "b", "c"])
    half = 4.302653 * np.sqrt(3 / 2 * 14) / 4
    np.testing.assert_allclose([mean, low, high], [3, 3 - half, 3 + half], rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "skewed", "right or wrong"])
def test_bootstrap_interval_has_its_coverage(kind: str) -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for seed in range(1000):
        if kind == "normal":
            values, truth = rng.normal(0.3, 1, 100), 0.3
        elif kind == "skewed":
            values, truth = rng.exponential(1, 200), 1.0
        else:  # the difference of two 0/1 scores
            values = (rng.random(100) < 0.7).astype(float) - (rng.random(100) < 0.5)
            truth = 0.2
        low, high = bootstrap_ci(values, seed, resamples=500)
        hits += low <= truth <= high
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.long
def test_compare_keeps_its_error_rate_over_several_rewards() -> None:
    """The chance that any of four rewards, two of them correlated, is called different."""
    rng = np.random.default_rng(5)
    false_alarms = 0
    for _ in range(1000):
        shared, by_system = rng.normal(0, 3, (60, 4)), rng.normal(0, 1, (2, 60, 4))
        by_system[:, :, 1] = 0.8 * by_system[:, :, 0] + 0.6 * by_system[:, :, 1]
        a, b = shared + by_system
        a[:, 3], b[:, 3] = a[:, 3] > 0, b[:, 3] > 0  # right or wrong, as a checker says
        scores = {s: {str(r): t[:, r] for r in range(4)} for s, t in (("a", a), ("b", b))}
        rows = compare(scores, [("a", "b")], [str(i) for i in range(60)], resamples=2)
        false_alarms += any(row["p_holm"] < 0.05 for row in rows)
    assert false_alarms / 1000 <= 0.06


def test_equal_scores_and_equal_shifts() -> None:
    scores = np.linspace(0, 1, 12)
    same = paired_comparison(scores, scores)
    assert (same.difference, same.p_value, same.win_rate) == (0, 1, 0.5)
    shifted = paired_comparison(scores + 0.1, scores)
    assert shifted.p_value == 2.0**-11 and shifted.test == "sign"
    assert shifted.difference == pytest.approx(0.1)
    assert paired_comparison([1, 1], [0, 0]).p_value == 0.5
    assert paired_comparison([1, 0], [1, 1]).win_rate == 0.25


def test_prompts_that_are_all_alike_have_no_variance_though_their_images_differ() -> None:
    """Two images of each prompt, right and wrong the other way round: nothing is known."""
    right, prompts = np.tile([1.0, 0.0], 256), np.repeat(np.arange(256), 2)
    swapped = paired_comparison(right, 1 - right, prompts)
    assert (swapped.difference, swapped.p_value, swapped.test) == (0, 1, "paired t")
    fewer = paired_comparison([1, 0, 0, 0, 0, 0, 1, 0], [0] * 8, [0] * 4 + [1] * 4)
    assert fewer.p_value == 0.5 and fewer.test == "sign"  # one prompt's sign like the other's
    # .1 + .2 and .3 − 1e-17: what rounding leaves is no variance either
    near = paired_comparison([0.1, 0.2, 0.15, 0.15], [0.0] * 4, ["a", "a", "b", "b"])
    assert near.p_value == 0.5
    votes = [1.0, 0.0, 0.0] * 6
    of_six = proportion_ci(votes, clusters=[i // 3 for i in range(18)])
    assert of_six[1] < proportion_ci(votes)[1] and of_six[2] > proportion_ci(votes)[2]


@pytest.mark.parametrize("bad", [[1.0], [[1.0, 2.0]], [1.0, np.nan], []])
def test_statistics_refuse_bad_scores(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="scores"):
        mean_ci(bad)
    with pytest.raises(ValueError, match="2 with 3"):
        paired_comparison([1, 2], [1, 2, 3])


def test_bootstrap_agrees_with_the_t_interval_and_is_seeded() -> None:
    values = np.random.default_rng(3).normal(0.2, 1, 400)
    _, low, high = mean_ci(values)
    found = bootstrap_ci(values, seed=0)
    assert found == pytest.approx((low, high), abs=0.01)
    assert found == bootstrap_ci(values, seed=0) != bootstrap_ci(values, seed=1)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values"):
        holm([1.2])


# --- scoring systems --------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    text: str
    metadata: dict[str, object] = field(default_factory=dict)


PROMPTS = [Text(f"p{i}", {"index": i}) for i in range(10)]
MEAN = FunctionReward(lambda x, p, m: x.mean((1, 2, 3)), "mean", differentiable=True)


def grey(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def flat(name: str, offset: float, nfe: int = 4) -> System:
    """Images of one grey, (index + offset) / 20."""
    return System(name, nfe, lambda rows: grey([(i + offset) / 20 for i in rows]))


def test_evaluation_scores_every_prompt_and_compares() -> None:
    seen: list[tuple[str, int, int]] = []
    index = FunctionReward(
        lambda x, p, m: torch.tensor([float(about["index"]) for about in m]), "index"
    )
    result = evaluate_systems(
        [flat("low", 0.0), flat("high", 4.0, 100)],
        PROMPTS,
        [MEAN, index],
        batch_size=4,
        progress=lambda *call: seen.append(call),
        comparisons=[("high", "low")],
        keep=6,
    )
    assert seen == [(name, done, 10) for name in ("low", "high") for done in (4, 8, 10)]
    rounded = np.round(np.arange(10) / 20 * 255) / 255  # scored as eight bits hold it
    np.testing.assert_allclose(result.scores["low"]["mean"], rounded, atol=1e-6)
    assert result.scores["high"]["index"].tolist() == list(range(10))
    assert result.images["high"].shape == (6, 4, 4, 3)
    assert result.images["high"].dtype == np.uint8
    assert result.images["high"][:, 0, 0, 0].tolist() == [51, 64, 76, 89, 102, 115]
    summary = result.summary
    assert summary["prompts"] == 10 and summary["systems"]["high"]["nfe"] == 100
    mean, low, high = mean_ci(result.scores["low"]["mean"])
    assert summary["systems"]["low"]["scores"]["mean"] == {"mean": mean, "ci95": [low, high]}
    first, second = summary["comparisons"]
    assert (first["a"], first["b"], first["reward"]) == ("high", "low", "mean")
    assert first["difference"] == pytest.approx(0.2, abs=0.003)
    assert first["p_value"] < first["p_holm"] < 0.01
    assert (second["reward"], second["difference"], second["p_value"]) == ("index", 0, 1)


def test_diversity_is_a_column_of_the_systems_that_can_redraw() -> None:
    def draws(spread: float) -> System:
        def redraw(rows: Sequence[int], draw: int) -> Tensor:
            images = grey([0.5] * len(rows))
            images[:, 0] += torch.tensor([spread * draw * (1 + 0.01 * i) for i in rows])[
                :, None, None
            ]
            return images

        return System(f"spread {spread}", 4, lambda rows: redraw(rows, 0), redraw)

    colours = Diversity(lambda x: x.mean((2, 3)), prompts=4, images=3)
    total: list[int] = []
    result = evaluate_systems(
        [flat("flat", 1.0), draws(0.0), draws(0.1), draws(0.2)],
        PROMPTS,
        [MEAN],
        batch_size=3,
        progress=lambda name, done, n: total.append(n - done),
        comparisons=[("spread 0.2", "spread 0.1"), ("flat", "spread 0.1")],
        diversity=colours,
    )
    assert total.count(0) == 4
    columns = {name: s["scores"] for name, s in result.summary["systems"].items()}
    assert "diversity" not in columns["flat"]
    assert result.scores["spread 0.0"]["diversity"] == pytest.approx([0.0] * 4, abs=1e-6)
    assert (
        0 < columns["spread 0.1"]["diversity"]["mean"] < columns["spread 0.2"]["diversity"]["mean"]
    )
    measured = [(c["a"], c["reward"], c["n"]) for c in result.summary["comparisons"]]
    assert measured == [
        ("spread 0.2", "mean", 10),
        ("spread 0.2", "diversity", 4),
        ("flat", "mean", 10),
    ]


def test_points_are_scored_as_they_are() -> None:
    first = FunctionReward(lambda x, p, m: x[:, 0], "first", domain="points")
    system = System("line", 4, lambda rows: torch.tensor([[i * 1.25, 0.0] for i in rows]))
    result = evaluate_systems([system], PROMPTS, [first], 4)
    assert result.scores["line"]["first"].tolist() == [i * 1.25 for i in range(10)]
    assert result.images == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": []}, "at least one system"),
        ({"prompts": PROMPTS[:1]}, "two prompts"),
        ({"systems": [flat("a", 0.0), flat("a", 1.0)]}, "system 'a' is given twice"),
        ({"comparisons": [("a", "z")]}, "names 'z'; the systems are a"),
        ({"batch_size": 0}, "batch size"),
        (
            {"rewards": [FunctionReward(lambda x, p, m: x.mean((1, 2, 3)), "diversity")]},
            "no reward",
        ),
        ({"systems": [System("a", 1, lambda rows: grey([0.5]))]}, "gave 1 images for 5"),
        ({"systems": [System("a", 1, lambda rows: grey([-1.0] * len(rows)))]}, "outside"),
        ({"systems": [System("a", 1, lambda rows: grey([np.nan] * len(rows)))]}, "not finite"),
        (
            {"rewards": [FunctionReward(lambda x, p, m: x.mean((1, 2, 3)) / 0, "bad")]},
            "'bad'.*'p0'",
        ),
    ],
)
def test_evaluation_refuses(change: dict[str, object], message: str) -> None:
    given = {"systems": [flat("a", 1.0)], "prompts": PROMPTS, "rewards": [MEAN], "batch_size": 5}
    with pytest.raises(ValueError, match=message):
        evaluate_systems(**(given | change))  # type: ignore[arg-type]


def test_evaluation_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "run" / "evaluation.json"
    scores = {"a": {"r": np.array([1.0, 2, 4])}, "b": {"r": np.array([0.0, 2, 3])}}
    write_evaluation(path, {"comparisons": compare(scores, [("a", "b")], ["x", "y", "z"])})
    assert json.loads(path.read_text())["comparisons"][0]["test"] == "paired t"
    with pytest.raises(ValueError, match="JSON"):
        write_evaluation(path, {"x": float("nan")})
    assert "comparisons" in json.loads(path.read_text())
    assert [p.name for p in path.parent.iterdir()] == ["evaluation.json"]
