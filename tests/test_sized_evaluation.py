"""Several sizes of pictures in one evaluation, and in one call of `sample`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_helpers import Tiny
from PIL import Image
from rich.console import Console
from test_evaluation import COLOURS, MEAN, PROMPTS, Painter
from torch import Tensor
from typer.testing import CliRunner

import tiltflow
from tiltflow.cli.main import app
from tiltflow.core.sizes import Resolution, both, parse_size, said
from tiltflow.evaluation.chunks import Chunks
from tiltflow.evaluation.files import (
    read_evaluation,
    read_scores,
    scores_path,
    write_evaluation,
    write_scores,
)
from tiltflow.evaluation.scores import AtSize, Evaluation, System, evaluate_systems
from tiltflow.tasks.compare import run_compare
from tiltflow.tasks.report import write_run_report
from tiltflow.tasks.tables import show_sizes

SIZES = ("32x48", "48x32")


class Canvas(Painter):
    """A `Painter` whose images are of a size, and a little brighter where they are wider."""

    def __init__(self, name: str, size: str, offset: float = 0.0, stop_at: int | None = None):
        super().__init__(name, offset, stop_at)
        self.size = parse_size(size)

    def paint(self, rows: Sequence[int], draw: int) -> Tensor:
        height, width = self.size  # type: ignore[misc]
        brighter = width / 1000 * (1 + torch.tensor(rows) % 2).view(-1, 1, 1, 1)
        small = super().paint(rows, draw) + brighter
        return small.mean((2, 3), keepdim=True).expand(-1, 3, height, width)


def canvases(stop_at: int | None = None) -> list[list[Canvas]]:
    return [[Canvas("a", size), Canvas("b", size, 3.0, stop_at)] for size in SIZES]


def at(name: str, rows: Sequence[int], painters: Sequence[Canvas], folder: bool) -> AtSize:
    return AtSize(name, rows, [painter.system() for painter in painters], folder)


def scored(sizes: Sequence[AtSize], **more: Any) -> Evaluation:
    systems: Sequence[System] = sizes[0].systems
    more |= {"comparisons": [("b", "a")], "diversity": COLOURS, "sizes": sizes}
    return evaluate_systems(systems, PROMPTS, [MEAN], 2, **more)


def every() -> list[AtSize]:
    return [
        at(size, range(len(PROMPTS)), each, True)
        for size, each in zip(SIZES, canvases(), strict=True)
    ]


def own() -> list[AtSize]:
    rows = [[0, 1, 3, 6], [2, 4, 5]]
    return [at(*of, False) for of in zip(SIZES, rows, canvases(), strict=True)]


def test_a_prompts_score_is_the_mean_over_its_sizes() -> None:
    alone = [scored([size]) for size in every()]
    found, summary = scored(every()), scored(every()).summary
    for i, name in enumerate(SIZES):
        for system in "ab":
            values = found.sizes[name].scores[system]["mean"]
            assert np.array_equal(values, alone[i].scores[system]["mean"])
            table = summary["sizes"][name]["systems"][system]["mean"]
            assert table == alone[i].summary["systems"][system]["scores"]["mean"]
    for reward in ("mean", "diversity"):
        both = np.mean([one.scores["b"][reward] for one in alone], 0)
        np.testing.assert_allclose(found.scores["b"][reward], both, rtol=1e-15)
    # 7 prompts, not 14: two pictures of one prompt are not independent
    assert summary["prompts"] == 7 and {row["n"] for row in summary["comparisons"]} == {7, 5}
    assert summary["sizes"]["32x48"]["prompts"] == 7 and summary["systems"]["b"]["cmmd"] > 0
    assert found.images == {} and found.measured == alone[0].measured


def test_each_prompt_at_its_own_size() -> None:
    alone = [scored([size]) for size in every()]
    found = scored(own())
    for i, name in enumerate(SIZES):
        rows = list(own()[i].rows)
        values = found.sizes[name].scores["b"]["mean"]
        assert np.array_equal(values, alone[i].scores["b"]["mean"][rows])
        assert np.array_equal(found.scores["b"]["mean"][rows], values)
        assert found.summary["sizes"][name]["prompts"] == len(rows)
    assert len(found.scores["b"]["diversity"]) == len(found.measured["diversity"]) == 5
    console = Console(file=StringIO(), width=120)
    show_sizes(found.summary, console)
    assert "48x32 (3)" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", [True, False])
def test_a_killed_evaluation_of_sizes_goes_on_where_it_was(tmp_path: Path, folder: bool) -> None:
    sizes, saved = (every() if folder else own()), []

    def save(*call: Any) -> None:
        saved.append((call[0], *call[1]))

    chunks = Chunks(tmp_path / "parts", {})
    stopping = canvases(stop_at=1)
    stopped = [at(s.name, s.rows, p, folder) for s, p in zip(sizes, stopping, strict=True)]
    with pytest.raises(KeyboardInterrupt):
        scored(stopped, take=chunks.take, save_images=save)
    resumed = scored(sizes, take=chunks.take, save_images=save)
    assert resumed.summary == scored(own() if not folder else every()).summary
    assert len(saved) == len(set(saved))
    assert sum(len(rows) - 1 for rows in saved) == (28 if folder else 14)
    places = {f"{system}/{size}" for system in "ab" for size in SIZES} if folder else {"a", "b"}
    assert {rows[0] for rows in saved} == places


def stored(folder: Path, sizes: Sequence[AtSize]) -> Path:
    found, path = scored(sizes), folder / "evaluation.json"
    write_evaluation(path, found.summary)
    write_scores(scores_path(path), found, PROMPTS)
    return path


def told(*arguments: object, size: str | None = None) -> str:
    console = Console(file=StringIO(), width=200)
    run_compare(*arguments, console, size=size)  # type: ignore[arg-type]
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_scores_are_compared_over_the_sizes_or_at_one(tmp_path: Path) -> None:
    one, two = stored(tmp_path / "one", every()), stored(tmp_path / "two", own())
    whole, found = scored(every()), read_scores(scores_path(one))
    assert np.array_equal(found.scores["b"]["mean"], whole.scores["b"]["mean"])
    assert set(found.sizes) == {SIZES} and found.prompts == tuple(p.text for p in PROMPTS)
    wide = read_scores(scores_path(two), "48x32")
    assert wide.prompts == tuple(PROMPTS[i].text for i in (2, 4, 5)) and wide.sizes == ((),) * 3
    text = told([one], None, None)
    assert "n" in text and "mean by size" in text
    assert "wins 100% of 7" in told([one], None, None, size="32x48")
    with pytest.raises(ValueError, match="on different sizes of pictures: name one"):
        told([one, two], "b,a", None)
    with pytest.raises(ValueError, match="on different prompts"):
        told([one, two], "b,a", None, size="48x32")
    assert "one:b is higher" in told(
        [one, stored(tmp_path / "three", every())], "b,a", None, size="48x32"
    )
    with pytest.raises(ValueError, match="no scores of pictures of the size 8x16"):
        told([one], None, None, size="8x16")
    summary = json.loads(one.read_text())
    one.write_text(json.dumps(summary | {"sizes": {"../32": summary["sizes"]["32x48"]}}))
    with pytest.raises(ValueError, match="is no evaluation"):
        read_evaluation(one)


@pytest.mark.parametrize("size", [64, (32, 48), (9, 32, 48)])
def test_an_evaluation_at_any_size_is_read_again(tmp_path: Path, size: Resolution) -> None:
    """That of videos was written with all its figures, and refused by whatever reads one."""
    found = scored(every())
    sizes = {said(size): found.summary["sizes"]["32x48"], "1x1": found.summary["sizes"]["48x32"]}
    write_evaluation(tmp_path / "evaluation.json", found.summary | {"sizes": sizes})
    assert read_evaluation(tmp_path)["sizes"].keys() == sizes.keys()


# --- a pipeline whose noise levels follow the size ----------------------------------------------

TEXTS = ["a cat", "two dogs", "a red bird"]
HOW: dict[str, Any] = {
    "device": "cpu", "teacher_steps": 2, "max_sequence_length": 8, "steps": 2, "cache": "off",
    "seed": 5,
}  # fmt: skip


def sharpness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.diff(dim=-1).abs().mean((1, 2, 3))


REWARD = "test_sized_evaluation:sharpness"


@pytest.mark.long
def test_every_prompt_at_several_sizes_is_runs_over_one(
    tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    model, out = tiny_pipeline("flux_dev"), tmp_path / "run"
    sizes = [(32, 48), (48, 32), 32]
    found = tiltflow.evaluate(
        model, TEXTS, [REWARD], out=out / "evaluation.json", sizes=sizes, keep_images=True, **HOW
    )
    for size in sizes:
        alone = tiltflow.evaluate(
            model, TEXTS, [REWARD], out=tmp_path / said(size) / "e.json", resolution=size, **HOW
        )
        for system, table in alone.scores.items():
            assert np.array_equal(found.sizes[said(size)].scores[system][REWARD], table[REWARD])
            image = Image.open(out / "evaluation.images" / system / said(size) / "00002.png")
            assert image.size == both(size)[::-1]
            other = Image.open(tmp_path / said(size) / "e.images" / system / "00002.png")
            assert np.array_equal(np.asarray(image), np.asarray(other))
    (out / "config.yaml").write_text("stage: cold_start\n")
    page = write_run_report([out], None).read_text()
    assert 'id="sizes"' in page and "48x32 (3)" in page and "two dogs (48x32)" in page
    paths = tiltflow.sample(model, TEXTS[:2], out=tmp_path / "images", sizes=sizes, **HOW)
    assert [path.relative_to(tmp_path / "images").parts for path in paths[1:3]] == [
        ("32x48", "00001.png"), ("48x32", "00000.png"),
    ]  # fmt: skip
    turned = tiltflow.sample(model, TEXTS[:2], resolution=(48, 32), **HOW)
    assert np.array_equal(np.asarray(Image.open(paths[2])), turned[0])


def test_a_column_gives_each_prompt_its_size(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    model, file = tiny_pipeline("flux_dev"), tmp_path / "prompts.jsonl"
    sizes = [[32, 48], "48x32", "32x48"]
    rows = [{"prompt": text, "as": size} for text, size in zip(TEXTS, sizes, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    command = ["sample", "--model", str(model), "--prompts", str(file), "--column", "size=as"]
    for name, value in HOW.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    found = CliRunner().invoke(app, [*command, "--batch", "1", "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    wide = tiltflow.sample(model, TEXTS, resolution=(32, 48), batch=1, **HOW)
    tall = tiltflow.sample(model, TEXTS, resolution=(48, 32), batch=1, **HOW)
    for i, image in enumerate((wide[0], tall[1], wide[2])):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png")), image)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "32x40"], "--size 32x40 must be in both sides a positive multiple of 16"),
        (["--resolution", "40"], "the size 40 must be a positive multiple of 16"),
        (["--size", "32x48", "--size", "32x40"], "--size 32x40 must be in both sides a positive"),
        (["--size", "32x48", "--size", "32x48"], "--size 32x48 is given twice"),
        (["--size", "32x48", "--column", "size=as"], "or a column of the prompts' sizes"),
    ],
)
def test_sizes_that_cannot_be_say_one_sentence(
    tiny_pipeline: Tiny, tmp_path: Path, options: list[str], words: str
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "as": 32}')
    base = ["sample", "--model", str(tiny_pipeline("flux_dev")), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*base, "--prompts", str(tmp_path / "p.jsonl"), *options])
    assert found.exit_code != 0 and words in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_other_sentences_about_sizes(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "as": 32}, {"prompt": "b", "as": "wide"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    how: Any = {"columns": {"size": "as"}}
    with pytest.raises(ValueError, match="--column size: prompt 2: 'wide' is no size"):
        tiltflow.sample("packaged:pipeline", tmp_path / "p.jsonl", **how)
    with pytest.raises(ValueError, match="^images of several sizes are no one array"):
        tiltflow.sample("packaged:pipeline", ["a"], sizes=[64, 96])
    with pytest.raises(ValueError, match="either --resolution, or --size, or"):
        tiltflow.sample("packaged:pipeline", ["a"], sizes=[64, 96], resolution=64)
    with pytest.raises(ValueError, match="sizes are of pictures, and the mixture makes none"):
        tiltflow.sample("mixture", ["a"], sizes=[64, 96], out=tmp_path, few_step=tmp_path)
    with pytest.raises(ValueError, match="^sizes is .*, but it should"):
        tiltflow.sample("packaged:pipeline", ["a"], sizes=[64, "x"])  # type: ignore[list-item]
