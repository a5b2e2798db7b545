"""benchmarks/videos.py: what its measures say of videos whose content is known, and its short form
from the autoencoder to the picture."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("support.moving_shapes")


@pytest.fixture
def drawn(world: ModuleType) -> tuple[Tensor, list[str]]:
    """Every scene four times, in eight bits."""
    scenes = [*world.scenes(True), *world.scenes(False)] * 4
    videos = world.render(scenes, torch.Generator().manual_seed(0))
    return world.VIDEOS.rounded(videos), [each.text for each in scenes]


def test_a_direction_of_every_pair_is_held_out(world: ModuleType) -> None:
    held, trained = world.scenes(True), world.scenes(False)
    assert len(held) == 18 and len(trained) == 54 and not set(held) & set(trained)
    assert {(s.colour, s.shape) for s in held} == {(s.colour, s.shape) for s in trained}
    assert all(world.Scene.of(s.text) == s for s in held)


def test_what_is_drawn_is_found(world: ModuleType, drawn: tuple[Tensor, list[str]]) -> None:
    videos, texts = drawn
    assert world.VIDEOS.check(videos) is None
    for measure in (world.colour_right, world.direction_right):
        assert measure(videos, texts, None).min() == 1
    assert world.shape_right(videos, texts, None).mean() > 0.97
    far, low, high = world.travel(videos, texts, None), *(8 * speed for speed in world.SPEEDS)
    assert far.min() > low - 0.5 and far.max() < high + 0.5
    assert world.steered(videos, texts, None).min() > 0.4


@pytest.mark.parametrize(
    ("measure", "given", "other"),
    [
        ("colour_right", "a red circle moves left", "a magenta circle moves left"),
        ("shape_right", "a red circle moves left", "a red square moves left"),
        ("direction_right", "a red circle moves left", "a red circle moves right"),
        ("direction_right", "a red circle moves left", "a red circle moves up"),
    ],
)
def test_another_prompt_is_not_met(world: ModuleType, measure: str, given: str, other: str) -> None:
    scenes = [world.Scene.of(given)] * 16
    videos = world.render(scenes, torch.Generator().manual_seed(1))
    of = getattr(world, measure)
    assert of(videos, [given] * 16, None).mean() > 0.9
    assert of(videos, [other] * 16, None).max() == 0


def test_stills_and_empty_videos_have_no_direction(
    world: ModuleType, drawn: tuple[Tensor, list[str]]
) -> None:
    videos, texts = drawn
    still = videos[:, :1].expand_as(videos)
    empty = torch.full_like(videos, 0.5)
    for none in (still, empty):
        assert world.direction_right(none, texts, None).max() == 0
        assert world.travel(none, texts, None).max() == 0
    assert world.steered(still, texts, None).abs().max() < 1e-6
    assert (world.steered(empty, texts, None) == -1).all()
    assert world.colour_right(empty, texts, None).max() == 0


def test_the_taste_in_frames_prefers_a_still_in_the_middle(world: ModuleType) -> None:
    centres = torch.full((1, world.FRAMES, 2), world.SIDE / 2)
    moving = centres.clone()
    moving[..., 0] += torch.linspace(-6, 6, world.FRAMES)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1)
    still, gone = (
        (world.mask("circle", at, torch.tensor([4.0])).unsqueeze(2) * red)[0]
        for at in (centres, moving)
    )
    assert world.poster(still, None, None).mean() > 1.3 * world.poster(gone, None, None).mean()
    frame = gone[0:1].clone().requires_grad_(True)
    world.poster(frame, None, None).sum().backward()
    assert frame.grad is not None and frame.grad.isfinite().all() and frame.grad.any()


@pytest.mark.long
def test_the_short_form_runs_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    videos = importlib.import_module("videos")
    monkeypatch.setattr(videos, "ARMS", {"both": videos.ARMS["frames and motion"]})
    work, out, figure = tmp_path / "work", tmp_path / "videos.json", tmp_path / "videos.webp"
    bench = videos.Bench(work, videos.SHORT, videos.Console(quiet=True))
    for stage in videos.STAGES:
        videos.run(stage, bench, [0], out, figure)
    tables = capsys.readouterr().out
    cells = json.loads(out.read_text())["cells"]
    assert set(cells["start"]) == {"teacher", "teacher_4_step", "ac_dmd"}
    assert "| tilted: both |" in tables and "| both, seed 0 |" in tables
    (scores,) = cells["both, seed 0"]
    assert {len(values) for values in scores.values()} == {4}
    assert cells["watch of both, seed 0"][0]["means"]["motion"] > 0
    with Image.open(figure) as picture:
        assert picture.size == (364, 298)  # equal frames are one in the file
    made = {path: path.stat().st_mtime_ns for path in work.glob("*_*/**/*.safetensors")}
    for stage in ("cold_start", "tilt"):  # all is there
        videos.run(stage, bench, [0], out, figure)
    assert made == {path: path.stat().st_mtime_ns for path in work.glob("*_*/**/*.safetensors")}
    assert len(made) > 4


def test_the_kept_cells_make_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """And these have the figures of the page."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    videos = importlib.import_module("videos")
    kept = json.loads((BENCHMARKS.parent / "docs" / "data" / "videos.json").read_text())["cells"]
    bench = videos.Bench(Path("unused"), videos.Form(), videos.Console(quiet=True))
    made = videos.table(kept, [p.text for p in bench.prompts()], list(videos.ARMS), [0])
    page = (BENCHMARKS.parent / "docs" / "lab" / "videos.md").read_text()
    shown = [line.split(" | ")[4] for line in made.splitlines() if line.startswith("| tilted: ")]
    assert len(shown) == 6
    for cell in shown:
        assert cell.replace("0.", ".").replace("-", "−") in page
