"""The fake score of stage 2: what a resumed run must find of it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_families_training import recipe, run, same

from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.setup import starts
from tiltflow.setup.starts import continues, starting_point

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.long


@pytest.fixture
def cold(tiny_pipeline: Tiny, tmp_path: Path) -> Path:
    """A stage 1 whose adapters have another α than stage 2's, at the same rank."""
    run("cold_start", "sd3", tiny_pipeline, tmp_path / "cold", "adapters.alpha=8.0")
    return tmp_path / "cold"


def tilted(cold: Path, tiny: Tiny, *more: str) -> tuple[str, ...]:
    return (f"model.few_step={cold}", "adapters.alpha=2.0", *more)


def halted(cold: Path, tiny: Tiny, out: Path, *more: str) -> Path:
    """A stage 2 of one iteration."""
    run("tilt", "sd3", tiny, out, *tilted(cold, tiny, "train.steps=1", *more))
    return out


@pytest.mark.parametrize("begun", ["continued", "fresh"])
def test_a_run_whose_stage_1_is_gone_goes_on_as_the_uninterrupted_one(
    cold: Path, tiny_pipeline: Tiny, tmp_path: Path, begun: str
) -> None:
    """With stage 1's α in the fake score where it is trained on, else the own."""
    how = f"tilt.fake_score_start={begun}"
    whole = run("tilt", "sd3", tiny_pipeline, tmp_path / "w", *tilted(cold, tiny_pipeline, how))
    halted(cold, tiny_pipeline, tmp_path / "p", how)
    state = load_checkpoint(tmp_path / "p").state
    assert state["fake_score_continued"] == (begun == "continued")
    shutil.move(cold, tmp_path / "away")
    on = tilted(cold, tiny_pipeline, how, "run.resume=true")
    again = run("tilt", "sd3", tiny_pipeline, tmp_path / "p", *on)
    assert same(whole, again)


@pytest.mark.parametrize(("begun", "then"), [("continued", "fresh"), ("fresh", "continued")])
def test_another_start_of_the_fake_score_is_refused(
    cold: Path, tiny_pipeline: Tiny, tmp_path: Path, begun: str, then: str
) -> None:
    """It would lose what lies under it, or lie on what it was not trained on."""
    halted(cold, tiny_pipeline, tmp_path / "p", f"tilt.fake_score_start={begun}")
    on = tilted(cold, tiny_pipeline, f"tilt.fake_score_start={then}", "run.resume=true")
    with pytest.raises(ValueError, match=r"its fake score is .*tilt\.fake_score_start"):
        run("tilt", "sd3", tiny_pipeline, tmp_path / "p", *on)


def test_a_checkpoint_of_before_that_does_not_tell_the_strength_needs_stage_1(
    cold: Path, tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = halted(cold, tiny_pipeline, tmp_path / "p", "tilt.fake_score_start=continued")
    on = tilted(cold, tiny_pipeline, "run.resume=true")
    cfg, found = recipe("tilt", "sd3", tiny_pipeline, out, *on), load_checkpoint(out)
    assert continues(cfg, starting_point(cfg))
    shutil.rmtree(cold)
    assert continues(cfg, starting_point(cfg))  # from the run's own checkpoint
    state = {key: value for key, value in found.state.items() if key != "fake_score_continued"}

    def of(**changed: object) -> None:
        made = replace(found, state={**state, **changed})
        monkeypatch.setattr(starts, "load_checkpoint", lambda *a, **b: made)

    of()
    with pytest.raises(ValueError, match=r"is gone, and .* does not say whether its fake score"):
        starting_point(cfg)
    of(adapters=state["few_step_adapters"])  # where both are alike there is nothing to tell
    start = starting_point(cfg)
    assert start is not None and start.fake_score is None
