"""Evaluations on one page that `tiltflow compare` would refuse: their columns are told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, score

from tiltflow.tasks.report import write_run_report

PROMPTS = ("a red circle", "a blue square", "a green star")


def run(
    folder: Path,
    mean: float,
    weights: str = "one",
    seed: int = 0,
    prompts: Sequence[str] = PROMPTS,
    stored: bool = True,
    **changes: Any,
) -> Path:
    """A run directory with an evaluation of CLIPScore, as `tiltflow evaluate` leaves it."""
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: tilt\n")
    asked = {"prompts": "|".join(prompts), "seed": seed, "resolution": 64}
    asked |= {"rewards": {"clipscore": weights, "shapes": None}} | changes
    scores = {"clipscore": score(mean, 0.01), "shapes": score(mean + 0.1, 0.01)}
    system = {"nfe": 4, "scores": scores, "category_means": {"clipscore": mean}}
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "asked": asked,
        "content": {"prompts": "|".join(prompts), "rewards": {"clipscore": weights}},
        "systems": {"teacher": system | {"vendi": score(2.0, 0.1), "cmmd": 0.1}},
        "diversity_in": {"reward": "clipscore", "weights": weights},
    }
    (folder / "evaluation.json").write_text(json.dumps(summary))
    if stored:
        rows = [{"prompt": p, "scores": {"teacher": {"clipscore": mean}}} for p in prompts]
        path = folder / "evaluation.scores.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_of(*runs: Path) -> tuple[list[str], str]:
    """The columns of the table of results, and the paragraphs of the page."""
    page = Page(write_run_report(runs, runs[0].parent / "page.html").read_text())
    heads = page.text("th")
    columns = heads[heads.index("NFE") + 1 : heads.index("teacher, a")]
    return columns, "\n".join(page.text("p"))


def test_one_column_where_compare_would_compare(tmp_path: Path) -> None:
    columns, said = page_of(run(tmp_path / "a", 0.2), run(tmp_path / "b", 0.3))
    assert columns == ["clipscore", "shapes", "vendi", "cmmd"]
    assert "2 systems on 3 prompts, from the same noise." in said and "different" not in said


def test_other_weights_and_other_noise(tmp_path: Path) -> None:
    columns, said = page_of(run(tmp_path / "a", 0.2), run(tmp_path / "b", 0.3, "two", seed=1))
    assert columns == [
        "clipscore, a", "shapes", "clipscore, b", "vendi, a", "vendi, b", "cmmd, a", "cmmd, b",
    ]  # fmt: skip
    assert "2 systems on 3 prompts." in said and "prompts, from the same noise" not in said
    assert "of other weights, metadata or features, and are not to be compared" in said
    assert "different seeds, so images of two runs are not from the same noise" in said
    assert "cosine similarity of image and prompt" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("stored", [True, False])
def test_other_prompts_have_columns_of_their_own(tmp_path: Path, stored: bool) -> None:
    runs = [
        run(tmp_path / "a", 0.2, stored=stored),
        run(tmp_path / "b", 0.3, prompts=["a dog", "a cat", "a cow"], stored=stored),
    ]
    columns, said = page_of(*runs)
    assert columns[:4] == ["clipscore, a", "shapes, a", "clipscore, b", "shapes, b"]
    assert "on different prompts, so each has columns of its own" in said
    assert "different prompts, so images of two runs are not from the same noise" in said


def test_another_size_is_other_noise_and_the_same_columns(tmp_path: Path) -> None:
    columns, said = page_of(run(tmp_path / "a", 0.2), run(tmp_path / "b", 0.3, resolution=128))
    assert columns == ["clipscore", "shapes", "vendi", "cmmd"]
    assert "different sizes, so images of two runs are not from the same noise" in said
