"""Samples and the watch are of prompts from all over the file, as a run began."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tiltflow.config.load import load_config, read_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.setup import build as building
from tiltflow.setup.build import build_stage
from tiltflow.setup.checks import Subject, _check_watch
from tiltflow.setup.watch_prompts import SPREAD, looked_at, spread_out, spreads

GENEVAL = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
    "color_attr": 100,
}  # fmt: skip


def of(counts: dict[str, int]) -> list[Prompt]:
    return [Prompt(f"{tag} {i}", {"tag": tag}) for tag, n in counts.items() for i in range(n)]


def config(out: Path, prompts: Path, *more: str):
    given = [f"run.out={out}", "model.few_step=x", "run.device=cpu", f"data.eval_prompts={prompts}"]
    return load_config("demo_tilt", [*given, *more])


@pytest.fixture
def sorted_file(tmp_path: Path) -> Path:
    """96 lines of one object, then 1,000 of others."""
    path = tmp_path / "sorted.txt"
    texts = ["a red circle"] * 96 + [f"{n} blue squares" for n in range(2, 1002)]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.mark.parametrize("count", [24, 32, 64, 96])
def test_the_first_of_any_number_are_of_all_kinds(count: int) -> None:
    """GenEval's own order is by kind; its first 64 prompts are all single objects."""
    prompts = of(GENEVAL)
    seen = Counter(p.metadata["tag"] for p in spread_out(prompts)[:count])
    expected = {tag: count * n / len(prompts) for tag, n in GENEVAL.items()}
    assert all(abs(seen[tag] - expected[tag]) < 2 for tag in GENEVAL)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 8, 13])
def test_no_period_of_the_file_is_met(period: int) -> None:
    prompts = [Prompt(str(i % period)) for i in range(1024)]
    seen = Counter(p.text for p in spread_out(prompts)[:64])
    assert len(seen) == period and max(seen.values()) - min(seen.values()) <= 6


def test_every_prompt_has_its_place() -> None:
    for n in (0, 1, 2, 7, 553):
        prompts = [Prompt(str(i)) for i in range(n)]
        assert sorted(p.text for p in spread_out(prompts)) == sorted(p.text for p in prompts)


def begun(out: Path, **state: object) -> None:
    """A run that has saved step 2."""
    folder = out / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"stage": "tilt", **state}))
    (out / "checkpoints" / "latest").write_text("step-000002\n")


def test_a_run_that_goes_on_keeps_its_prompts(tmp_path: Path, sorted_file: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    begun(old)
    begun(new, **{SPREAD: True})
    sets = read_prompts(config(old, sorted_file))
    for resume in ("run.resume=true", "run.resume=auto", "run.resume_from=step-000002"):
        more = [resume] if "resume=" in resume else [resume, "run.resume=true"]
        assert looked_at(config(old, sorted_file, *more), sets) == sets.fixed
        assert looked_at(config(new, sorted_file, *more), sets) == spread_out(sets.fixed)
    assert spreads(config(old, sorted_file))  # begun anew
    assert spreads(config(tmp_path / "none", sorted_file, "run.resume=auto"))
    (old / "checkpoints" / "step-000002" / "state.json").write_text("{")
    assert spreads(config(old, sorted_file, "run.resume=true"))


def test_checks_are_of_the_prompts_that_are_looked_at(tmp_path: Path, sorted_file: Path) -> None:
    """The first 96 lines, with six others among them, are too few texts; the file is not."""
    texts = sorted_file.read_text().splitlines()
    sorted_file.write_text("\n".join([*texts[100:106], *texts[6:]]) + "\n")
    _check_watch(Subject(config(tmp_path / "new", sorted_file, "watch.stop=true")))
    begun(tmp_path / "old")
    more = ("watch.stop=true", "run.resume=true")
    with pytest.raises(ValueError, match="the 96 images of watch.prompts are of 7 different"):
        _check_watch(Subject(config(tmp_path / "old", sorted_file, *more)))


@pytest.mark.long
def test_a_stage_is_built_with_them(
    tmp_path: Path, sorted_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["run.device=cpu", "data.cache=off", f"data.eval_prompts={sorted_file}"]
    cfg = load_config("demo_cold_start", [*given, f"run.out={tmp_path / 'run'}", "run.resume=auto"])
    prompts = read_prompts(cfg).fixed
    build = build_stage(cfg)
    assert build.fixed is not None
    assert list(build.fixed.prompts) == spread_out(prompts)[: len(build.fixed)]
    assert build.facts.as_json()[SPREAD] is True
    begun(tmp_path / "run")
    monkeypatch.setattr(building, "starting_point", lambda cfg: None)
    build = build_stage(cfg)
    assert build.fixed is not None and list(build.fixed.prompts) == prompts[: len(build.fixed)]
    assert SPREAD not in build.facts.as_json()
