from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiltflow.evaluation import figures
from tiltflow.evaluation.charts import WIDTH, Series, chart, curves
from tiltflow.evaluation.report import p_text, write_report

VOID = {"meta", "img", "line", "circle", "polyline", "br", "link"}


class Page(HTMLParser):
    """All elements with their attributes, the text by enclosing tag, and whether tags balance."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], " ".join(data.split())))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def text(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def drawn(svg: str, part: str) -> list[np.ndarray]:
    """The points (n, 2) of each drawn line or outline of a figure that is called so."""
    paths = re.findall(rf'<g class="{part}">\s*<path d="([^"]*)"', svg)
    return [
        np.array([float(v) for v in re.findall(r"-?[0-9.]+", path)]).reshape(-1, 2)
        for path in paths
    ]


def score(mean: float, half: float) -> dict[str, object]:
    return {"mean": mean, "ci95": [mean - half, mean + half]}


EVALUATION: dict[str, Any] = {
    "prompts": 64,
    "systems": {
        "teacher": {
            "nfe": 100,
            "scores": {"shapes": score(0.51, 0.04), "diversity": score(0.3, 0.02)},
            "vendi": score(1.625, 0.1),
        },
        "rtdmd": {"nfe": 4, "scores": {"shapes": score(0.6234, 0.04)}, "cmmd": 0.07654},
    },
    "comparisons": [
        {"a": "rtdmd", "b": "teacher", "reward": "shapes", "difference": 0.1134,
         "ci95": [0.06, 0.17], "p_value": 0.0004, "test": "paired t"},
        {"a": "teacher", "b": "rtdmd", "reward": "clip", "difference": -0.02,
         "ci95": [-0.05, 0.01], "p_value": 0.21, "test": "paired t"},
        {"a": "teacher", "b": "rtdmd", "reward": "held", "difference": -0.02,
         "ci95": [-0.03, -0.01], "p_value": 0.03, "p_holm": 0.09, "test": "paired t"},
    ],
}  # fmt: skip
CURVES = {
    "cold_start": [{"step": i, "loss": 1 / (i + 1), "lr": 0.1, "note": "x"} for i in range(100)],
    "tilt": [{"step": i, "reward/shapes": i / 10, "bad": None} for i in range(5)],
}


def write(out: Path, **changes: Any) -> tuple[str, Page]:
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    given: dict[str, Any] = {
        "title": "A run",
        "evaluation": EVALUATION,
        "curves": CURVES,
        "grids": {"teacher": images, "rtdmd": images[::-1]},
        "prompts": ["a red circle", '<b>"two" & more</b>', "not shown"],
        "config": {"cold_start": "stage: cold_start\n", "tilt": "a: <script>alert(1)</script>\n"},
        "versions": {"torch": "2.13.0"},
    }
    path = write_report(out, **(given | changes))
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_the_page_is_one_offline_file(tmp_path: Path) -> None:
    source, page = write(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.html"]
    assert not re.findall(r"(?:https?:)?//[a-z]", source)
    assert not page.all("script") and not page.all("link")
    sources = [a.get("src") or a.get("href") for _, a in page.elements]
    assert all(s is None or s.startswith("data:image/png;base64,") for s in sources)
    assert "@import" not in source and "url(" not in source
    viewport = [m["content"] for m in page.all("meta") if m.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]
    assert "prefers-color-scheme: dark" in source
    assert page.all("html") == [{"lang": "en"}] and page.text("title", "h1") == ["A run", "A run"]


def test_results_and_comparisons_in_figures_and_words(tmp_path: Path) -> None:
    _, page = write(tmp_path)
    cells = page.text("b", "small", "td", "th")
    for figure in ("0.510", "0.470 to 0.550", "0.623", "0.583 to 0.663", "100", "4", "0.300"):
        assert figure in cells
    assert "not measured" in cells  # the diversity of a system that has none
    at = cells.index("rtdmd against teacher")
    assert cells[at + 2 : at + 6] == ["higher by 0.113", "+0.113", "0.060 to 0.170", "p < 0.001"]
    at = cells.index("teacher against rtdmd")
    assert cells[at + 2 : at + 6] == [
        "no significant difference", "−0.020", "−0.050 to 0.010", "p = 0.21"
    ]  # fmt: skip
    # The adjusted p-value decides.
    assert "p = 0.090" in cells and cells.count("no significant difference") == 2
    at = cells.index("cmmd")
    assert cells[at - 1] == "vendi" and {"1.625", "1.525 to 1.725", "0.077"} <= set(cells)
    assert cells.count("–") == 2  # the teacher's distance to itself, and the other's Vendi score
    best = [a for a in page.all("td") if a.get("class") == "best"]
    assert len(best) == 1  # the one that was compared, and found higher


def test_figures_have_labels_axes_and_units(tmp_path: Path) -> None:
    source, page = write(tmp_path)
    svgs = [s for s in page.all("svg") if s.get("role") == "img"]
    labels = [s["aria-label"] or "" for s in svgs]
    # Two intervals, one curve of each stage: a constant has none, nor has text.
    assert len(labels) == 4
    assert labels[0].startswith("Mean shapes with 95% intervals: teacher 0.510, rtdmd 0.623")
    assert labels[2].startswith("cold_start: loss over training, from 0.33")
    assert labels[3] == "tilt: reward/shapes over training, from 0 to 0.400"
    axes = page.text("text")
    assert axes.count("training step") == 2
    assert "loss (no unit)" in axes and "mean reward (no unit)" in axes
    lines = drawn(source, "series")
    assert [len(points) for points in lines] == [100, 100, 5]  # a curve, its median, another
    for points in lines:
        assert points.min() >= 0 and points[:, 0].max() <= WIDTH
        assert points[:, 1].max() <= figures_bottom(source)
    bars, dots = drawn(source, "bar"), drawn(source, "dot")
    assert len(bars) == len(dots) == 3  # two systems under one reward, one under another
    for bar, dot in zip(bars, dots, strict=True):  # every mean is in the middle of its interval
        assert np.allclose(bar.mean(0), dot.mean(0), atol=0.1)


def figures_bottom(source: str) -> float:
    """The height of a step's label, below which no line may reach."""
    heights = re.findall(
        r'<text [^>]*text-anchor: middle[^"]*"[^>]* y="([0-9.]+)"[^>]*>[0-9,]+<', source
    )
    return min(map(float, heights[-3:]))


def test_samples_are_the_images_with_alternatives(tmp_path: Path) -> None:
    _, page = write(tmp_path)
    images = page.all("img")
    assert [i["alt"] for i in images] == [
        "a red circle, by teacher",
        "a red circle, by rtdmd",
        '<b>"two" & more</b>, by teacher',
        '<b>"two" & more</b>, by rtdmd',
    ]
    expected = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for tag, index in zip(images, (0, 1, 1, 0), strict=True):
        data = base64.b64decode((tag["src"] or "").partition(",")[2])
        assert np.array_equal(np.array(Image.open(io.BytesIO(data))), expected[index])
    assert "not shown" not in page.text("th")


def test_text_is_escaped(tmp_path: Path) -> None:
    source, page = write(tmp_path, title="<i>x</i> & y")
    assert page.text("h1") == ["<i>x</i> & y"]
    assert "<script" not in source and "&lt;script&gt;alert(1)" in source
    assert "a: <script>alert(1)</script>" in page.text("pre")
    assert '<b>"two" & more</b>' in page.text("th")


def test_large_images_are_shrunk_and_bad_ones_refused(tmp_path: Path) -> None:
    large = np.zeros((400, 800, 3), dtype=np.uint8)
    _, page = write(tmp_path, grids={"a": [large]})
    assert [(i["width"], i["height"]) for i in page.all("img")] == [("256", "128")]
    with pytest.raises(ValueError, match=r"'a': report images are \(H, W, 3\) uint8"):
        write(tmp_path, grids={"a": [np.zeros((4, 4, 3))]})
    with pytest.raises(ValueError, match="'a' has 4 images for 3 prompts"):
        write(tmp_path, grids={"a": [large] * 4})


def test_a_report_of_training_alone(tmp_path: Path) -> None:
    page = write(tmp_path / "alone.html", evaluation={}, grids={}, versions={})[1]
    assert [p.name for p in tmp_path.iterdir()] == ["alone.html"]
    assert page.text("h2") == ["Training", "How it was made"]


def test_many_curves_are_folded(tmp_path: Path) -> None:
    rows = [{"step": i, **{f"m{k}": i * k for k in range(1, 10)}} for i in range(3)]
    page = write(tmp_path, curves={"s": rows})[1]
    assert "3 more curves of s" in page.text("summary")


def test_curves_cut_spikes_and_thin_long_runs() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": 1 + (i % 7) / 10} for i in range(200)]
    rows[50]["loss"] = 500.0
    (curve,) = curves("s", rows)
    assert curve.note == "Bold: running median of 10 points. 1 point lies outside the frame."
    raw, smooth = drawn(curve.svg, "series")
    assert len(raw) == len(smooth) == 200
    assert np.ptp(smooth[:, 1]) > 1  # the spike does not flatten the rest
    long = [{"step": i, "loss": float(i)} for i in range(1999)]
    (curve,) = curves("s", long)
    assert (
        curve.note
        == "A point is the mean of 4 lines of the log. Bold: running median of 25 points."
    )
    assert len(drawn(curve.svg, "series")[0]) == 500
    with pytest.raises(ValueError, match="no step"):
        curves("s", [{"loss": 1.0}])


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    assert write(tmp_path / "a")[0] == write(tmp_path / "b")[0]


def test_figures_follow_the_page(tmp_path: Path) -> None:
    """Its colours, dark ones too, its font, and nothing that a second figure could clash with."""
    source, page = write(tmp_path, curves={"s $x^$ <b>": CURVES["tilt"]})
    inside = "".join(re.findall("<svg.*?</svg>", source, re.S))
    assert "#" not in inside and "font-family" not in inside and " id=" not in inside
    names = set(re.findall(r"var\(--(\w+)\)", inside))
    assert names and all(source.count(f"--{name}: ") == 2 for name in names)
    assert any(str(s["aria-label"]).startswith("s $x^$ <b>: reward") for s in page.all("svg"))


@pytest.mark.parametrize("name", ['a" clip-path="', ' d="M 0.123', "$a^", "_x", "名", "<i>&"])
def test_a_name_is_text_in_a_figure(tmp_path: Path, name: str) -> None:
    series = [Series(name, np.arange(3.0), np.arange(3.0)), Series("b", np.arange(3.0), np.ones(3))]
    made = Page(chart(name, "axis", series).svg)
    assert f"{' '.join(name.split())}, last 2.00" in made.text("text")
    assert len(drawn(chart(name, "axis", series).svg, "series")) == 2


def test_titles_of_axes_fit_beside_them() -> None:
    names = [*figures._METRICS, "held_out/x", "watch/trained/x", "tilt/reward/x"]
    assert all(len(figures.axis_title(name)) <= 31 for name in names)


def test_numbers_for_readers() -> None:
    given = (0, 0.5, 0.04567, -2.345, 123.4, 1234.5, 0.00001234, 2.5e9)
    found = [figures.number(v) for v in given]
    assert found == ["0", "0.500", "0.0457", "−2.35", "123", "1234", "1.23e−05", "2.50e+09"]
    assert figures.number(-0.04567, 2) == "−0.05"
    assert figures.decimals([(0.4, 0.48), (0.1, 0.5)]) == 3
    assert figures.decimals([(1, 1)]) == 3 and figures.decimals([(0, 5000)]) == 0
    assert [p_text(p) for p in (1e-9, 0.004, 0.0499, 0.21, 1.0)] == [
        "p < 0.001", "p = 0.004", "p = 0.0499", "p = 0.21", "p = 1.00"
    ]  # fmt: skip
