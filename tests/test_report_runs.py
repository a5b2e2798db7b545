"""The report of several runs: the watch, alarms, sheets, merged tables; and in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import Page, drawn, score

from tiltflow.evaluation.charts import Series, chart, side_by_side
from tiltflow.evaluation.watch.history import TEACHER, History, Measurement
from tiltflow.tasks.report import write_run_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALARM = "diversity is 0.2, 0.50 of the 0.4 at step 0 (the limit is 0.7)"


def make_run(folder: Path, seed: int, alarm: bool) -> Path:
    """A stage-2 run directory as training leaves it, with an evaluation."""
    rng = np.random.default_rng(seed)
    (folder / "samples").mkdir(parents=True)
    rules = {"diversity": 0.7, "drift": 2.0, "high_frequency": 2.0}
    (folder / "config.yaml").write_text(
        "stage: tilt\nwatch:\n  rules:\n" + "".join(f"    {k}: {v}\n" for k, v in rules.items())
    )
    rows = [{"step": i, "reward/clip": 0.3 + i / 100, "loss": 1.0 / i} for i in range(1, 21)]
    rows[9]["alarm/diversity"] = ALARM  # words do not disturb the curves
    if alarm:
        rows.append(
            {"step": 20, "watch/ended": "an alarm at step 20 ended the run; step 10 is kept"}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    history = History(folder / "watch.jsonl", -1)
    base = rng.normal(size=32)
    for step in (0, 10, 20):
        values = {
            "held_out/other": base + step / 50, "trained/clip": base + step / 20,
            "diversity": 0.4 + 0 * base - 0.01 * step, "drift": base + step / 50,
            "high_frequency": base - step / 40,
        }  # fmt: skip
        if step == 0:
            values |= {TEACHER + "high_frequency": base[:8] + 0.1, TEACHER + "drift": base[:8]}
        tripped = {"diversity": ALARM} if alarm and step == 20 else {}
        history.add(Measurement(step, values, tripped))
        sheet = rng.integers(0, 256, (16, 64, 3), dtype=np.uint8)
        Image.fromarray(sheet).save(folder / "samples" / f"step-{step:06d}.png")
    summary = {
        "prompts": 64,
        "systems": {
            "teacher": {"nfe": 100, "scores": {"shapes": score(0.5, 0.04)},
                        "category_means": {"shapes": 0.512}},
            "rtdmd": {"nfe": 4, "scores": {"shapes": score(0.6 + 0.01 * seed, 0.04)},
                      "category_means": {"shapes": 0.61 + 0.01 * seed}},
        },
        "categories": {
            tag: {"prompts": n, "systems": {"teacher": {"shapes": {"mean": 0.4, "ci95": None}},
                                            "rtdmd": {"shapes": {"mean": mean + 0.01 * seed}}}}
            for tag, n, mean in (("colors", 40, 0.7), ("counting", 24, 0.52))
        },
        "comparisons": [
            {"a": "rtdmd", "b": "teacher", "reward": "shapes", "difference": 0.1,
             "ci95": [0.05, 0.15], "p_value": 0.03, "p_holm": 0.03, "test": "paired t"}
        ],
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(summary))
    kept = folder / "evaluation.images"
    for system in summary["systems"]:
        (kept / system).mkdir(parents=True)
        Image.fromarray(sheet[:, :16]).save(kept / system / "00000.png")
    (kept / "prompts.txt").write_text("a red circle\n")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "calm", 1, False), make_run(folder / "hacked", 2, True)]
    return write_run_report(runs, folder / "page.html")


def test_two_runs_on_one_page(report: Path) -> None:
    source = report.read_text()
    page = Page(source)
    assert [p.name for p in report.parent.glob("*.html")] == ["page.html"]
    addresses = re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]+", "", source))
    assert addresses == [] and "<script" not in source
    assert page.text("h1") == ["tiltflow: calm and hacked"]
    cells = page.text("td", "th")
    at = cells.index("hacked")
    assert cells[at : at + 4] == ["hacked", "20", "diversity", ALARM]
    assert any("an alarm at step 20 ended the run; step 10 is kept" in t for _, t in page.texts)
    labels = [str(s["aria-label"]) for s in page.all("svg")]
    for start in (
        "Held-out against trained rewards, calm over training: clip (trained) from 0 to ",
        "Held-out against trained rewards, hacked over training",
        "Diversity against the start over training: calm from 1.00 to 0.500; hacked from 1.00",
        "Teacher's velocity gap against its own samples' over training: calm from 1.00 to 1.49",
        "High-frequency energy against the teacher's over training: calm from 0.905 to ",
        "reward/clip over training: calm from 0.310 to 0.500; hacked",
    ):
        assert any(label.startswith(start) for label in labels), start
    assert any("limits 0.700; first alarm of hacked at step 20" in label for label in labels)
    sheets = [i["alt"] for i in page.all("img") if str(i["alt"]).startswith("Sheet")]
    assert sheets == [
        f"Sheet of samples of {run} after step {step}, on the fixed prompts and noise"
        for run in ("calm", "hacked")
        for step in (0, 20)
    ]
    assert all(i.get("alt") for i in page.all("img"))


def test_evaluations_of_several_runs_are_one_table(report: Path) -> None:
    page = Page(report.read_text())
    rows = page.text("th")
    for name in ("teacher", "rtdmd, calm", "rtdmd, hacked"):
        assert name in rows
    assert "teacher, hacked" not in rows  # the same teacher with the same scores
    # two comparisons of p = .03 in one table: neither is below .05 after Holm's correction
    assert page.text("td").count("no significant difference") == 2
    assert "p = 0.060" in page.text("td")
    grid = [i["alt"] for i in page.all("img") if str(i["alt"]).startswith("a red circle")]
    assert grid == [f"a red circle, by {s}" for s in ("teacher", "rtdmd, calm", "rtdmd, hacked")]


def test_categories_of_several_runs_are_one_table_if_they_are_the_same(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed, False) for seed, name in enumerate(("a", "b"), 1)]
    page = Page(write_run_report(runs, tmp_path / "page.html").read_text())
    cells = page.text("th", "td")
    at = cells.index("colors (40)")
    assert cells[at : at + 15] == [
        "colors (40)", "counting (24)", "mean of categories", "teacher", "0.400", "0.400", "0.512",
        "rtdmd, a", "0.710", "0.530", "0.620", "rtdmd, b", "0.720", "0.540", "0.630",
    ]  # fmt: skip
    path = tmp_path / "b" / "evaluation.json"
    found = json.loads(path.read_text())
    found["categories"]["colors"]["prompts"] = 41
    path.write_text(json.dumps(found))
    assert "By category" not in write_run_report(runs, tmp_path / "page.html").read_text()


def test_one_run_without_an_alarm(tmp_path: Path) -> None:
    page = Page(write_run_report([make_run(tmp_path / "calm", 1, False)], None).read_text())
    assert any(t.startswith("No alarm") for t in page.text("p"))
    assert "Runs side by side" not in page.text("h2")
    labels = [str(s["aria-label"]) for s in page.all("svg")]
    assert any(label.endswith("limits 0.452 and 2.00") for label in labels)  # 0.905 / 2, 1 × 2


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / p / "tilt", k, False) for k, p in enumerate(("a", "b"))]
    page = Page(write_run_report([*runs, runs[0]], tmp_path / "page.html").read_text())
    assert page.text("h3") == ["a/tilt", "b/tilt"]


def test_charts_hold_their_points_and_limits() -> None:
    steps = np.arange(5.0)
    made = chart("t", "a", [Series("x", steps, np.ones(5))], [(3.0, "limit")], [(2.0, "alarm")])
    (line,), (limit,), (mark,) = (drawn(made.svg, part) for part in ("series", "limit", "mark"))
    assert limit[:, 1].max() < line[:, 1].min()  # drawn at its own height, not at the edge
    assert drawn(made.svg, "band") == [] and "alarm at step 2" in made.svg
    assert np.allclose(mark[:, 0], line[2, 0]) and np.ptp(mark[:, 1]) > 100
    with pytest.raises(ValueError, match="'t' has no points"):
        chart("t", "a", [])
    rows = {
        r: [{"step": i, "loss": i * k, "only": 1} for i in range(3)]
        for k, r in ((1, "a"), (2, "b"))
    }
    rows["b"] = [{"step": r["step"], "loss": r["loss"]} for r in rows["b"]]
    (both,) = side_by_side(rows)
    assert both.title == "loss" and both.note == "" and "b, last 4.00" in both.svg


def test_what_is_called_a_last_value_is_one() -> None:
    """A smoothed line ends elsewhere than its log: the legend says so, and a note why."""
    rows = [{"step": i, "loss": 1.0} for i in range(100)] + [{"step": 100, "loss": 9.0}]
    (made,) = side_by_side({"long": rows, "short": rows[-3:]})
    assert "long, ends at 1.00" in made.svg and "short, last 9.00" in made.svg
    assert "running medians" in made.note


def test_no_two_lines_look_alike() -> None:
    """Six colours, and a stroke of its own for a seventh line of the first."""
    series = [Series(str(k), np.arange(3.0), np.ones(3) * k, dashed=k % 2 > 0) for k in range(18)]
    svg = chart("t", "a", series).svg
    lines = re.findall(r'<g class="series">\s*<path d="[^"]*" style="([^"]*)"', svg)
    assert len(lines) == 18 and len(set(lines)) == 18


def test_a_long_run_beside_another_takes_no_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 lines are thinned before they are smoothed."""
    seen: list[int] = []

    def counted(values: np.ndarray) -> np.ndarray:
        seen.append(len(values))
        return values

    monkeypatch.setattr("tiltflow.evaluation.charts.running_median", counted)
    rows = [{"step": i, "loss": i % 7} for i in range(10_000)]
    (made,) = side_by_side({"a": rows, "b": rows})
    assert max(seen) <= 600 and made.title == "loss"


READER = """<!doctype html><body><iframe id="f" src="{page}" width="{width}" height="800"></iframe>
<script>document.getElementById("f").onload = e => {{
  const d = e.target.contentDocument;
  document.body.dataset.wide = d.documentElement.scrollWidth;
  document.body.dataset.loaded = [...d.images].every(i => i.complete && i.naturalWidth > 0);
  document.body.dataset.text = d.body.innerText;
}}</script>"""


@pytest.mark.long
def test_in_a_browser(report: Path, tmp_path: Path) -> None:
    """Rendered text, images and width on a phone's screen, and a screenshot that is not blank."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    common = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    # a browser asks its maker for updates at every start: nothing here needs a network
    common += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    common += [
        "--disable-sync",
        "--disable-quic",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    wrapper = tmp_path / "reader.html"
    wrapper.write_text(READER.format(page=report.as_uri(), width=390))
    arguments = ["--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run([*common, *arguments], capture_output=True, text=True, timeout=300)
    found = {k: html.unescape(v) for k, v in re.findall(r'data-(\w+)="([^"]*)"', done.stdout, re.S)}
    assert found["wide"] == "390" and found["loaded"] == "true"
    for text in ("1 alarm.", ALARM, "Runs side by side", "Samples during training", "rtdmd, calm"):
        assert text in found["text"], text
    picture = tmp_path / "page.png"
    arguments = ["--window-size=500,1600", f"--screenshot={picture}", report.as_uri()]
    subprocess.run([*common, *arguments], capture_output=True, timeout=300, check=True)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[1] == 500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
