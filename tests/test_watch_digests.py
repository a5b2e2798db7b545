"""A watch that measures otherwise than before compares only what it measured alike."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiltflow.config.load import load_config
from tiltflow.data.prompts import Prompt
from tiltflow.desk.runs import Log
from tiltflow.evaluation import watch_figures
from tiltflow.evaluation.figures import metric_series
from tiltflow.evaluation.watch.history import History, Measurement, read_history
from tiltflow.evaluation.watch.probes import ProbeSettings
from tiltflow.evaluation.watch.rules import judge
from tiltflow.evaluation.watch.settings import WatchRules
from tiltflow.evaluation.watch.watch import Watch
from tiltflow.evaluation.watch_figures import Watched, watch_charts
from tiltflow.setup.watch_facts import series_digests
from tiltflow.tasks.watching import look

N = 64
A, B = {"drift": "a", "held_out/h": "h"}, {"drift": "b", "held_out/h": "h"}
WEIGHTS = {"clip": 1.0}


def values(shift: float, teacher: bool, n: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {"drift": rng.normal(size=n) + shift, "held_out/h": rng.normal(size=n)}
    return found | ({"teacher/drift": found["drift"][:32] - 0.1} if teacher else {})


def watch(path: Path, start: int, digests: dict[str, str], shift: float, n: int = N) -> Watch:
    history = History(path, start)
    return Watch(
        lambda step, teacher: Measurement(step, values(shift, teacher, n)),
        WatchRules(), WEIGHTS, history, digests,
    )  # fmt: skip


def test_what_is_measured_otherwise_has_a_reference_of_its_own(tmp_path: Path) -> None:
    """The generator stays as it is; drift at other levels has other values."""
    path = tmp_path / "watch.jsonl"
    first = watch(path, -1, A, 0.0)
    assert not first(0).alarms and not first(1).alarms and first.renewed == []
    again = watch(path, 1, B, 2.0)
    seen = again(2)
    assert again.renewed == ["drift"] and not seen.alarms and "teacher/drift" in seen.values
    figures = look(again, 2, SimpleNamespace(alarm=None))
    assert figures.notes == {"watch/anew": "watch/drift"}
    assert figures.metrics["watch/drift"] == pytest.approx(np.exp(0.1))
    assert not again(3).alarms and again.renewed == []
    assert "teacher/drift" not in again.history.rows[-1].values
    # a change of the generator under the new settings is still seen, and so is one under the old
    assert "drift" in watch(path, 3, B, 4.0)(4).alarms
    back = watch(path, 3, A, 2.0)
    assert "drift" in back(4).alarms and back.renewed == []
    # without the digests, the other levels are an alarm
    assert "drift" in watch(tmp_path / "old.jsonl", -1, {}, 0.0)(0).values
    assert "drift" in watch(tmp_path / "old.jsonl", 0, {}, 2.0)(1).alarms


def test_lines_of_older_runs_are_taken_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "watch.jsonl"
    watch(path, -1, {}, 0.0)(0)
    assert '"digests"' not in path.read_text()
    again = watch(path, 0, A, 2.0)
    assert "drift" in again(1).alarms and again.renewed == []  # the reference is not lost
    after = watch(path, 1, B, 2.0)
    assert not after(2).alarms and after.renewed == ["drift"]


def test_another_number_of_samples_is_another_measure(tmp_path: Path) -> None:
    path = tmp_path / "watch.jsonl"
    watch(path, -1, A, 0.0)(0)
    both = {name: digest + "!" for name, digest in A.items()}
    assert not watch(path, 0, both, 0.0, n=32)(1).alarms
    with pytest.raises(ValueError, match="32 samples of drift, the watch now measures 16"):
        watch(path, 1, both, 0.0, n=16)(2)
    path.write_text(
        '{"step": 0, "alarms": {}, "values": {"drift": [1]}, "digests": {"drift": 3}}\n'
    )
    with pytest.raises(ValueError, match="step 0 is no measurement"):
        read_history(path)


def test_agreement_begins_where_rewards_are_measured_alike() -> None:
    """A trained reward is gamed from step 2 on; the held-out one has other prompts since step 1."""
    rng = np.random.default_rng(1)
    base, rise = rng.normal(size=4 * N), np.abs(rng.normal(size=4 * N))

    def at(step: int, gamed: float, of: str) -> Measurement:
        noise = 0.1 * np.random.default_rng(step).normal(size=4 * N)
        two = {"trained/clip": base + gamed * rise, "held_out/h": base + (of == "b") + noise}
        return Measurement(step, two, digests=dict.fromkeys(two, of))

    def rules(*looks: Measurement) -> list[str]:
        return list(judge(looks, WatchRules(), WEIGHTS))

    assert rules(at(0, 0, "a"), at(1, 5, "b")) == []
    assert rules(at(0, 0, "a"), at(1, 0, "b"), at(2, 5, "b")) == ["agreement"]
    # a fall since the highest mean, of the same measure alone
    low = Measurement(3, {"held_out/h": base - 3, "trained/clip": base + 5}, digests={})
    one = Measurement(3, low.values, digests=dict.fromkeys(low.values, "c"))
    assert rules(at(0, 0, "a"), one) == []


def digests(features: object = None, prompts: str = "p", **more: object) -> dict[str, str]:
    given = ["run.out=x", "model.few_step=x", *(f"{k}={v}" for k, v in more.items())]
    cfg = load_config("demo_tilt", given)
    settings = ProbeSettings(
        samples=cfg.watch.prompts, groups=8, draws=4, teacher_samples=8,
        teacher_sigmas=torch.linspace(1, 0, cfg.watch.teacher_steps + 1), guidance=1.0,
        levels=cfg.watch.levels, cutoff=cfg.watch.frequency,
    )  # fmt: skip
    medium = SimpleNamespace(probes={"high_frequency": None})
    fixed = SimpleNamespace(
        encoded=SimpleNamespace(prompts=[Prompt(f"{prompts} {i}") for i in range(99)]),
        sigmas=torch.linspace(1, 0, 5), eta=0.9,
    )  # fmt: skip
    backbone = SimpleNamespace(latent_shape=(4, 8, 8), medium=medium)
    tables = {"held_out": cfg.watch.rewards, "trained": cfg.rewards}
    loaded = {
        group: SimpleNamespace(rewards=[SimpleNamespace(reward=called(name)) for name in table])
        for group, table in tables.items()
    }
    return series_digests(cfg, backbone, fixed, settings, features, loaded)


SERVED = {"contents": "c0"}


def called(name: str) -> SimpleNamespace:
    """A loaded reward: one behind a server is called as it is there, and a class as it says."""
    if name.startswith("remote:"):
        return SimpleNamespace(name=name.rpartition("/")[2], **SERVED)
    return SimpleNamespace(name="bright" if ":" in name else name)


NAMES = {
    "diversity", "drift", "high_frequency", "held_out/shapes", "held_out/clipscore_heldout",
    "trained/clipscore",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, set()),
        ({"watch.levels": "[0.05]"}, {"drift"}),
        ({"watch.frequency": "0.2"}, {"high_frequency"}),
        ({"watch.teacher_steps": "4"}, {"drift", "high_frequency"}),
        ({"watch.prompts": "64"}, NAMES),
        ({"prompts": "q"}, NAMES),
        ({"features": {"path": "x"}}, {"diversity"}),
        ({"rewards.clipscore.weight": "3"}, set()),
        ({"watch.rewards.clipscore_heldout.options.at_once": "8"}, set()),
        ({"watch.rewards.clipscore_heldout.path": "packaged:clip"}, {"held_out/clipscore_heldout"}),
        ({"watch.every": "3", "watch.rules.alpha": "0.01", "run.seed": "3"}, set()),
    ],
)
def test_a_digest_is_of_what_its_series_depends_on(changed: dict, names: set[str]) -> None:
    before, after = digests(), digests(**changed)
    assert set(before) == NAMES
    assert {name for name in NAMES if before[name] != after[name]} == names


def test_a_reward_with_a_name_of_its_own_has_a_digest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name that its series has: without one, whatever was measured otherwise was held
    against what had been before. The address of a server may be another, what it serves may not."""

    def at(host: str, prompts: str = "p") -> dict[str, str]:
        names = f"remote:http://{host}:8000/mine", "test_watch_digests:values"
        return digests(prompts=prompts, **{"watch.rewards": json.dumps(dict.fromkeys(names, 1.0))})

    first, moved = at("a"), at("b")
    assert first == moved and {"held_out/mine", "held_out/bright"} < set(first)
    assert all(first[name] != other for name, other in at("a", "q").items())
    monkeypatch.setitem(SERVED, "contents", "c1")
    assert {name for name, was in first.items() if at("a")[name] != was} == {"held_out/mine"}


def test_figures_draw_no_rise_between_two_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_figures, "chart", lambda title, axis, series, *more: series)
    looks = [
        Measurement(step, values(shift, step in (0, 2)), digests=of)
        for step, shift, of in ((0, 0.0, A), (1, 0.0, A), (2, 2.0, B), (3, 2.0, B))
    ]
    (_, drift) = watch_charts({"run": Watched(looks, {"drift": 1.5})})
    assert [line.name for line in drift] == ["run", "run, anew from step 2"]
    assert [list(line.steps) for line in drift] == [[0, 1], [2, 3]]
    rows = [
        {"step": 0, "watch/drift": 1.0, "held_out/h": 0.2},
        {"step": 2, "watch/anew": "watch/drift"},
        {"step": 2, "watch/drift": 3.0, "held_out/h": 0.2},
    ]
    drawn = metric_series(rows)
    assert len(drawn["held_out/h"]) == 2
    assert drawn["watch/drift"].tolist() == [[2.0, 3.0]]
    assert drawn["watch/drift before step 2"].tolist() == [[0.0, 1.0]]
    log = Log(tmp_path / "metrics.jsonl")
    log.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.refresh()
    assert {"watch/drift", "watch/drift before step 2", "held_out/h"} == set(log.curves)
