"""The watch's rules on series with known answers, its memory, and what it measures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tiltflow.core.checkpoint import latest_step, point_latest, save_checkpoint
from tiltflow.evaluation.watch.drift import log_velocity_gap
from tiltflow.evaluation.watch.history import (
    LOGARITHMS,
    TEACHER,
    History,
    Measurement,
    read_history,
)
from tiltflow.evaluation.watch.rules import above_zero, judge
from tiltflow.evaluation.watch.settings import WatchRules
from tiltflow.evaluation.watch.watch import Watch
from tiltflow.models.families.mixture import GaussianMixture
from tiltflow.models.spectrum import high_frequency_energy

N = 96
WEIGHTS = {"clip": 1.0}
NAMES = ("held_out/h", "trained/clip", "diversity", "drift", "high_frequency", "motion")


def series(seed: int = 0, **shifts: float) -> Callable[[int], Measurement]:
    """Measurements of prompts that differ much, each with a little noise of its own.

    `shifts` are added per step by name (`/` written as `__`); the scale of every series is 1.
    """
    rng = np.random.default_rng(seed)
    base = {name: 2 + rng.normal(size=N) for name in NAMES}

    def at(step: int) -> Measurement:
        values = {}
        for name, start in base.items():
            shift = step * shifts.get(name.replace("/", "__"), 0.0)
            values[name] = start + shift + 0.3 * rng.normal(size=N)
        if step == 0:
            for name in LOGARITHMS:
                values[TEACHER + name] = base[name][:32] + 0.3 * rng.normal(size=32)
        return Measurement(step, values)

    return at


def run(at: Callable[[int], Measurement], looks: int = 10, **rules: float | None) -> dict[int, set]:
    """The rules that trip, by step; no `agreement`, as the series have nothing in common."""
    history: list[Measurement] = []
    found = {}
    for step in range(looks):
        history.append(at(step))
        alarms = judge(history, WatchRules(**{"agreement": None, **rules}), WEIGHTS)
        if alarms:
            found[step] = set(alarms)
    return found


def test_noise_trips_nothing() -> None:
    """500 looks at runs where nothing happens, with every threshold at its most sensitive."""
    sharp = {"held_out_fall": 0.0, "diversity": 0.999}
    sharp |= dict.fromkeys(("drift", "high_frequency", "motion"), 1.001)
    tripped = [run(series(seed), 20, **sharp) for seed in range(25)]
    assert sum(len(found) for found in tripped) <= 6  # about 1 expected, alike within a run
    assert not any(run(series(seed), 20) for seed in range(10))


@pytest.mark.parametrize(
    ("rule", "shifts"),
    [
        ("held_out/h", {"held_out__h": -0.05, "trained__clip": 0.1}),
        ("diversity", {"diversity": -0.15}),
        ("drift", {"drift": 0.5}),
        ("high_frequency", {"high_frequency": 0.2}),
        ("high_frequency", {"high_frequency": -0.2}),
        ("motion", {"motion": -0.4}),
    ],
)
def test_each_rule_sees_its_own_change_and_no_other(rule: str, shifts: dict[str, float]) -> None:
    found = run(series(1, **shifts))
    assert found and all(names == {rule} for names in found.values())
    assert 0 not in found
    assert not run(series(1, **shifts), **{rule.partition("/")[0] + FALL.get(rule, ""): None})


FALL = {"held_out/h": "_fall"}


def test_a_fall_counts_against_the_gain_and_only_while_a_trained_reward_rises() -> None:
    rng = np.random.default_rng(2)
    base = 2 + rng.normal(size=N)

    def history(held_out: list[float], trained: list[float]) -> list[Measurement]:
        return [
            Measurement(
                step,
                {
                    "held_out/h": base + h + 0.05 * rng.normal(size=N),
                    "trained/clip": base + t + 0.05 * rng.normal(size=N),
                },
            )
            for step, (h, t) in enumerate(zip(held_out, trained, strict=True))
        ]

    rules = WatchRules(held_out_fall=0.25, agreement=None)
    for held_out, trained, alarm in (
        ([0, 0.5, 1.0, 0.85], [0, 1, 2, 3], False),  # lost 15% of the gain
        ([0, 0.5, 1.0, 0.65], [0, 1, 2, 3], True),  # lost 35%
        ([0, 0.5, 1.0, 0.65], [0, 1, 2, 1], False),  # the trained reward fell with it
        ([0, -0.1], [0, 1], True),  # no gain at all: any significant fall
        ([0, 0.5, 1.0, 0.65], [0, -1, -2, -3], False),
    ):
        assert bool(judge(history(held_out, trained), rules, WEIGHTS)) == alarm, held_out
    # a reward of negative weight is trained downwards
    assert judge(history([0, -0.1], [0, -1]), rules, {"clip": -1.0})
    text = judge(history([0, 1.0, 0.5], [0, 1, 2]), rules, WEIGHTS)["held_out/h"]
    assert "since step 1" in text and "the trained clip rose" in text


def _changes(seed: int, rise: float, common: float, changed: float = 1.0) -> list[Measurement]:
    """Two measurements: a share of the samples changes, by `rise` and spread in the trained reward;
    `common` is the part of the spread that the held-out reward has too."""
    rng = np.random.default_rng(seed)
    base, moved = rng.normal(size=N), rng.random(N) < changed
    shared, own, other = rng.normal(size=(3, N)) * moved
    rest = math.sqrt(1 - common**2)
    right = (base > 0).astype(float)
    start = {"trained/clip": base, "held_out/h": base, "held_out/right": right}
    after = {
        "trained/clip": base + rise * moved + common * shared + rest * own,
        "held_out/h": base + common * shared + rest * other,
        # a few answers that turn out right, where the trained reward happens to have risen
        "held_out/right": np.where(own > 1.5, 1.0, right),
    }
    return [Measurement(0, start), Measurement(5, after)]


class TestAgreement:
    RULES = WatchRules(held_out_fall=None, agreement=0.4)

    def tripped(self, rise: float, common: float, changed: float = 1.0) -> int:
        runs = [_changes(seed, rise, common, changed) for seed in range(40)]
        return sum(bool(judge(run, self.RULES, WEIGHTS)) for run in runs)

    def test_a_rise_that_no_held_out_reward_shares(self) -> None:
        """Before any held-out mean has fallen; and when two in five samples have not changed."""
        assert self.tripped(1.0, 0.0) >= 30
        assert self.tripped(2.0, 0.0, changed=0.6) >= 20

    def test_no_alarm_where_they_go_together_or_nothing_rose(self) -> None:
        assert self.tripped(1.0, 0.9) == 0  # rank correlation about .8
        assert self.tripped(0.0, 0.0) == 0
        assert self.tripped(-1.0, 0.0) == 0
        assert self.tripped(1.0, 0.64) <= 2  # at the limit itself

    def test_one_held_out_reward_that_goes_along_is_enough(self) -> None:
        start, after = _changes(2, 1.0, 0.0)
        assert "0.4" in judge([start, after], self.RULES, WEIGHTS)["agreement"]
        values = {**after.values, "held_out/second": after.values["trained/clip"]}
        both = [
            Measurement(0, {**start.values, "held_out/second": start.values["trained/clip"]}),
            Measurement(5, values),
        ]
        assert not judge(both, self.RULES, WEIGHTS)

    def test_a_negative_weight_rises_by_falling(self) -> None:
        assert judge(_changes(2, -1.0, 0.0), self.RULES, {"clip": -1.0})
        assert not judge(_changes(2, 1.0, 0.0), self.RULES, {"clip": -1.0})

    def test_several_rewards_count_in_their_own_standard_deviations(self) -> None:
        """A reward of a wide scale does not drown the one that is hacked."""
        start, after = _changes(2, 1.0, 0.0)
        rng = np.random.default_rng(9)
        wide = 1000 * rng.normal(size=N)
        values = {**after.values, "trained/wide": wide + rng.normal(size=N)}
        history = [Measurement(0, {**start.values, "trained/wide": wide}), Measurement(5, values)]
        assert judge(history, self.RULES, {"clip": 1.0, "wide": 1.0})


def test_an_initial_offset_of_the_spectrum_is_no_alarm() -> None:
    rng = np.random.default_rng(3)
    teacher = rng.normal(size=32)
    base = np.concatenate([teacher, rng.normal(size=N - 32)])

    def at(step: int, shift: float) -> Measurement:
        values = {"high_frequency": base + shift + 0.1 * rng.normal(size=N)}
        return Measurement(
            step, values | ({TEACHER + "high_frequency": teacher} if step == 0 else {})
        )

    far = math.log(3)
    for shifts, alarm in (
        ([-far, -far], False),  # three times too blurred from the start, and still so
        ([-far, 0], False),  # comes to the teacher's
        ([-far, 0.9 * math.log(2)], False),  # beyond the start's band, inside the teacher's
        ([-far, 1.2 * math.log(2)], True),
        ([-far, -far - 1.2 * math.log(2)], True),  # yet more blurred
    ):
        history = [at(step, shift) for step, shift in enumerate(shifts)]
        assert bool(judge(history, WatchRules(), WEIGHTS)) == alarm, shifts
    message = judge([at(0, 0), at(1, -2)], WatchRules(), WEIGHTS)["high_frequency"]
    assert re.search(r"0\.1[34] times", message) and "below both; blur" in message


def test_one_sided_test() -> None:
    rng = np.random.default_rng(4)
    rejected = sum(above_zero(rng.normal(size=20), 0.05) for _ in range(2000))
    assert abs(rejected / 2000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert not above_zero(np.full(5, 0.1), 0.01) and above_zero(np.full(10, 0.1), 0.01)
    assert not above_zero(np.zeros(100), 0.01) and not above_zero(np.full(100, -1.0), 0.01)
    # of two prompts whose images differ and whose means do not, no rise is known
    assert not above_zero(np.tile([1.0, 0.0], 20), 1e-3, np.repeat([0, 1], 20))


def test_the_memory_resumes_exactly(tmp_path: Path) -> None:
    path, shifts = tmp_path / "watch.jsonl", {"diversity": -0.15}

    def watch(start: int) -> Watch:
        at = {step: m for step, m in enumerate(map(series(5, **shifts), range(8)))}
        return Watch(lambda step, first: at[step], WatchRules(), WEIGHTS, History(path, start))

    whole = watch(-1)
    texts = [dict(whole(step).alarms) for step in range(8)]
    lines = path.read_text()
    assert any(texts) and whole.good == 7 - sum(map(bool, texts)) and whole.alarmed
    path.write_text(lines + '{"step": 8, "ala')  # killed in mid-line
    again = watch(3)
    assert [m.step for m in again.history.rows] == [0, 1, 2, 3]
    assert [dict(again(step).alarms) for step in range(4, 8)] == texts[4:]
    assert path.read_text() == lines
    assert again.metrics(again.history.rows[0])["watch/alarms"] == 0
    with pytest.raises(ValueError, match="96 samples of drift, the watch now measures 4"):
        again.history.add(Measurement(9, {"drift": np.zeros(4)}))
    path.write_text('{"step": 1, "values": 3, "alarms": {}}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="step 1 is no measurement"):
        read_history(path)


def test_the_good_checkpoint_outlives_the_others(tmp_path: Path) -> None:
    for step in (0, 25, 50, 75, 100):
        save_checkpoint(tmp_path, step, {"w": {"a": torch.ones(1)}}, {}, 2, good=min(step, 30))
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-000025", "step-000075", "step-000100"]
    assert point_latest(tmp_path, 60) == 25 and latest_step(tmp_path) == 25
    with pytest.raises(ValueError, match="no checkpoint of step 24 or before"):
        point_latest(tmp_path, 24)
    (tmp_path / "checkpoints" / "step-000075" / "w.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="torn"):
        point_latest(tmp_path, 80)
    assert latest_step(tmp_path) == 25


def test_energy_of_known_images() -> None:
    """One cosine of the DCT has all its energy, amplitude²/2, at its own frequency."""
    size = 32
    x = (torch.arange(size) + 0.5) / size * math.pi
    for k, frequency in ((4, 4 / 64), (16, 16 / 64)):
        wave = 0.5 + 0.25 * torch.cos(k * x)
        images = wave.expand(2, 3, size, size)
        for cutoff in (frequency - 0.01, frequency + 0.01):
            expected = 0.25**2 / 2 if cutoff < frequency else 0.0
            found = high_frequency_energy(images, cutoff)
            assert torch.allclose(found, torch.full((2,), expected, dtype=torch.float64), atol=1e-9)
    noise = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    mean_square = (noise - noise.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).double()
    everything = high_frequency_energy(noise, 1e-6)  # all but the constant, by Parseval
    assert torch.allclose(everything, mean_square, rtol=1e-5)
    with pytest.raises(ValueError, match="cutoff"):
        high_frequency_energy(noise, 0.5)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        high_frequency_energy(noise[:, :1], 0.2)


def test_energy_sees_grids_and_blur() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.nn.functional.interpolate(
        torch.rand(4, 3, 8, 8, generator=generator), size=64, mode="bilinear"
    ) + 0.02 * torch.rand(4, 3, 64, 64, generator=generator)
    grid = plain.clone()
    grid[..., ::8] += 0.1
    grid[..., ::8, :] += 0.1
    blurred = torch.nn.functional.avg_pool2d(plain, 5, 1, 2, count_include_pad=False)
    energies = [high_frequency_energy(i, 0.125) for i in (blurred, plain, grid)]
    assert (energies[1] > 2 * energies[0]).all() and (energies[2] > 2 * energies[1]).all()


def test_the_velocity_gap_is_the_divergence_and_a_spread() -> None:
    """E‖v_q − u‖² − E‖v_p − u‖² = E‖v_q − v_p‖², whose integral is KL(p ‖ q) = ‖m‖²/2s².

    One element a sample, so that the mean of exponentials is the mean square.
    """
    std, mean, samples, levels = 0.7, torch.tensor([[0.8]]), 20_000, 50
    p = GaussianMixture(mean, std, torch.ones(1))
    q = GaussianMixture(torch.zeros(1, 1), std, torch.ones(1))
    generator = torch.Generator().manual_seed(0)
    x0 = p.sample(samples, generator)
    noise = torch.randn(samples, 1, generator=generator)
    total = 0.0
    for i in range(levels):
        t = (i + 0.5) / levels
        of_q, of_p = (log_velocity_gap(x0, [t], [noise], g.velocity) for g in (q, p))
        total += (1 - t) / t * float((of_q.exp() - of_p.exp()).mean()) / levels
    assert total == pytest.approx(0.8**2 / (2 * std**2), rel=0.03)
    both = log_velocity_gap(x0, [0.2, 0.8], [noise, noise], q.velocity)
    single = [log_velocity_gap(x0, [t], [noise], q.velocity) for t in (0.2, 0.8)]
    assert both.shape == (samples,) and torch.allclose(both, (single[0] + single[1]) / 2)


def test_drift_of_samples_off_the_teachers_distribution() -> None:
    """Up for points where the teacher has none, down for points that are too near its modes."""
    p = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.2, torch.ones(2))
    generator = torch.Generator().manual_seed(1)
    own = p.sample(2000, generator)
    noises = [torch.randn(2000, 2, generator=generator) for _ in range(4)]
    levels = (0.2, 0.4, 0.6, 0.8)
    off, collapsed = own + 0.8, torch.tensor([[1.0, 0.0]]).expand(2000, 2)
    found = [log_velocity_gap(x, levels, noises, p.velocity).mean() for x in (collapsed, own, off)]
    assert found[0] < found[1] - math.log(1.5) and found[2] > found[1] + math.log(1.5)


@pytest.mark.parametrize("each", [1, 4])
def test_a_prompt_counts_once_however_many_samples_it_has(each: int) -> None:
    """Samples of one prompt change together. Where nothing changes on average, 400 runs of 24
    prompts trip a rule of level .05 in about 20; counted one by one, four samples of each prompt
    trip it several times as often."""
    rng, prompts = np.random.default_rng(6), np.repeat(np.arange(24), each)
    tripped = {True: 0, False: 0}
    rules = WatchRules(alpha=0.05, held_out_fall=0.0, agreement=None)
    for _ in range(400):
        shared = rng.normal(size=24)[prompts]
        start = {"held_out/h": rng.normal(size=len(prompts)), "trained/clip": np.zeros(24 * each)}
        fallen = start["held_out/h"] + shared + 0.3 * rng.normal(size=len(prompts))
        after = {"held_out/h": fallen, "trained/clip": np.ones(24 * each)}
        for known in tripped:
            of = tuple(prompts.tolist()) if known and each > 1 else ()
            looks = [Measurement(0, start, prompts=of), Measurement(1, after, prompts=of)]
            tripped[known] += bool(judge(looks, rules, WEIGHTS))
    assert 8 <= tripped[True] <= 34
    assert tripped[False] == tripped[True] if each == 1 else tripped[False] > 60


def test_agreement_ranks_prompts_where_they_repeat() -> None:
    """One prompt of ten that all held-out rewards disagree on is one, not as many as it has
    samples: ten prompts of eight samples are ten ranks."""
    rng, prompts = np.random.default_rng(7), tuple(np.repeat(np.arange(12), 8).tolist())
    shared, other = rng.normal(size=(2, 12))[:, list(prompts)]
    noise = 0.01 * rng.normal(size=(2, N))
    values = {"trained/clip": 3 + shared + noise[0], "held_out/h": other + noise[1]}
    start = {name: np.zeros(N) for name in values}
    looks = [Measurement(0, start), Measurement(1, values)]
    assert set(judge(looks, TestAgreement.RULES, WEIGHTS)) == {"agreement"}
    known = [Measurement(m.step, m.values, prompts=prompts) for m in looks]
    assert not judge(known, TestAgreement.RULES, WEIGHTS)


def test_the_memory_keeps_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "watch.jsonl"
    History(path, -1).add(Measurement(0, {"drift": np.zeros(3)}, prompts=(0, 1, 0)))
    (found,) = read_history(path)
    assert found.prompts == (0, 1, 0) and found.clusters(np.zeros(2)) == (0, 1)
    plain = path.read_text()
    for wrong in ("[0, 1]", "[0, 1, 0.5]", "3"):
        path.write_text(plain.replace("[0, 1, 0]", wrong))
        with pytest.raises(ValueError, match="step 0 is no measurement"):
            read_history(path)
