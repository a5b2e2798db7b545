"""Settings with which the watch's rules cannot trip are refused or said; ranks alone will do."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tiltflow.config.load import load_config
from tiltflow.core.distributed import ALONE
from tiltflow.evaluation.watch.history import Measurement
from tiltflow.evaluation.watch.rules import judge
from tiltflow.evaluation.watch.settings import WatchRules
from tiltflow.evaluation.watch_figures import Watched, watch_charts
from tiltflow.setup.checks import Subject, _check_watch
from tiltflow.setup.watch_prompts import too_few_texts
from tiltflow.tasks import watching

TILT = ("model.few_step=x", "run.device=cpu")


def looks(fall: float, trained: float | None = None) -> list[Measurement]:
    """Two measurements of 32 samples: a held-out reward falls, a trained one (if any) rises."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=32)
    found = []
    for step in (0, 1):
        values = {"held_out/h": base - step * fall + 0.05 * rng.normal(size=32)}
        if trained is not None:
            values["trained/clip"] = base + step * trained + 0.05 * rng.normal(size=32)
        found.append(Measurement(step, values))
    return found


def test_where_a_ranker_is_trained_on_a_fall_is_enough() -> None:
    found = judge(looks(5.0), WatchRules(), {"judge": 1.0})
    assert set(found) == {"held_out/h"}
    assert "since step 0" in found["held_out/h"] and "judge ranks images" in found["held_out/h"]
    for shift in (0.0, -5.0):
        assert judge(looks(shift), WatchRules(), {"judge": 1.0}) == {}
    # also beside a reward with scores that does not rise: it is not what the images follow
    beside = judge(looks(5.0, -1.0), WatchRules(agreement=None), {"clip": 1.0, "judge": 1.0})
    assert "judge ranks images" in beside["held_out/h"]


def test_stage_1_trains_on_no_reward_and_a_fall_is_enough() -> None:
    found = judge(looks(5.0), WatchRules(), {})
    assert set(found) == {"held_out/h"} and "ranks" not in found["held_out/h"]


def test_a_trained_reward_with_a_series_must_still_have_risen() -> None:
    rules = WatchRules(agreement=None)
    assert set(judge(looks(5.0, 1.0), rules, {"clip": 1.0})) == {"held_out/h"}
    assert judge(looks(5.0, -1.0), rules, {"clip": 1.0}) == {}


@pytest.mark.parametrize("key", ["prompts", "diversity_prompts", "teacher_images"])
def test_eight_is_the_fewest_of_every_series(key: str) -> None:
    words = f"watch.{key} is 7, but no test can tell a change from chance with fewer than 8"
    for stop in ("true", "false"):
        with pytest.raises(ValueError, match=re.escape(words)):
            load_config("demo_tilt", [*TILT, f"watch.{key}=7", f"watch.stop={stop}"])
    assert getattr(load_config("demo_tilt", [*TILT, f"watch.{key}=8"]).watch, key) == 8
    # where nothing is watched, or nothing judged, nothing is asked
    load_config("demo_tilt", [*TILT, f"watch.{key}=1", "watch.rewards={}"])
    load_config("demo_cold_start", [f"watch.{key}=1"])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([f"{i}" for i in range(64)], None),
        ([f"{i % 8}" for i in range(64)], None),
        ([f"{i % 7}" for i in range(64)], "the 64 images of watch.prompts are of 7 different"),
        (["a", "b", "c"], "the 64 images of watch.prompts are of 3 different"),
        ([f"{i // 6}" for i in range(64)], "the 24 images of watch.diversity_prompts are of 4 "),
        (["a"], None),  # counted one by one
    ],
)
def test_prompts_that_are_too_few(texts: list[str], said: str | None) -> None:
    found = too_few_texts(load_config("demo_tilt", [*TILT, "watch.prompts=64"]).watch, texts)
    assert (found is None) if said is None else (found or "").startswith(said)


def judged(different: int, n: int = 64) -> int:
    """In how many of 20 runs a fall of one standard deviation is seen."""
    of = tuple(i % different for i in range(n))
    tripped = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        base, own = rng.normal(size=n), 0.3 * rng.normal(size=different)[list(of)]
        start = {"held_out/h": base, "trained/clip": base}
        after = {
            name: base + shift + own + 0.3 * rng.normal(size=n)
            for name, shift in (("held_out/h", -1), ("trained/clip", 1))
        }
        pair = [Measurement(0, start, prompts=of), Measurement(1, after, prompts=of)]
        tripped += bool(judge(pair, WatchRules(agreement=None), {"clip": 1.0}))
    return tripped


def test_the_bound_is_where_the_tests_begin_to_see() -> None:
    """What is refused is blind, what is not sees; all samples of one prompt see, too."""
    assert judged(2) + judged(4) < 16
    assert judged(8) == judged(1) == 20


def test_few_prompts_are_refused_where_an_alarm_is_to_end_the_run(tmp_path: Path) -> None:
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text("a cat\na dog\na red bird\n")
    many.write_text("".join(f"a cat {i}\n" for i in range(8)))

    def check(prompts: Path, *more: str) -> None:
        _check_watch(
            Subject(load_config("demo_tilt", [*TILT, f"data.eval_prompts={prompts}", *more]))
        )

    check(few)
    check(many, "watch.stop=true")
    words = "watch.stop is true, and the 96 images of watch.prompts are of 3 different prompts"
    with pytest.raises(ValueError, match=re.escape(words)):
        check(few, "watch.stop=true")


def test_few_prompts_are_said_where_no_alarm_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "build_rewards", lambda *given: None)
    monkeypatch.setattr(watching, "_features", lambda *given: (1, None))
    monkeypatch.setattr(watching, "series_digests", lambda *given: {})
    monkeypatch.setattr(watching, "Tilt", SimpleNamespace)
    stage = SimpleNamespace(
        rewards=SimpleNamespace(advantage_weights={"judge": 1.0}),
        matching=SimpleNamespace(guidance=1.0),
        roles=None,
    )
    backbone = SimpleNamespace(teacher_sigmas=lambda steps: None)
    monkeypatch.setattr(watching, "Probes", lambda *given: SimpleNamespace(measure=None))
    cfg = load_config("demo_tilt", list(TILT))
    for count, notices in ((3, 1), (96, 0)):
        texts = [SimpleNamespace(text=f"{i}") for i in range(count)]
        fixed = SimpleNamespace(encoded=SimpleNamespace(prompts=texts))
        said: list[str] = []
        build = SimpleNamespace(stage=stage, backbone=backbone)
        watch = watching.build_watch(cfg, build, fixed, tmp_path, 0, said.append, ALONE)
        assert watch is not None and watch.weights == {"judge": 1.0}  # rankers too
        assert len(said) == notices
        assert all(text.startswith("watch: the 96 images of watch.prompts") for text in said)


def test_a_run_with_one_image_of_the_teacher_has_a_report() -> None:
    """Such runs are refused now, but there may be old ones."""
    rng = np.random.default_rng(0)
    values = {"drift": rng.normal(size=8), "diversity": 1 + rng.random(8)}
    watched = Watched([Measurement(0, values | {"teacher/drift": np.zeros(1)})])
    assert [chart.title for chart in watch_charts({"run": watched})] == [
        "Diversity against the start"
    ]
