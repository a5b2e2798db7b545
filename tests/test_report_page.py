"""The report in a real browser, at two widths: labels stay apart and inside their figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chromium import NEEDED, check_access
from test_report_runs import make_run

from tiltflow.evaluation.charts import curves
from tiltflow.tasks.report import write_run_report

pytestmark = NEEDED
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
NAMES = ("calm", "a_run_whose_name_is_much_longer_than_its_figure", "hacked")

CLASHES = """() => {
  const found = [];
  const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1
    || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  for (const svg of document.querySelectorAll("svg[role=img]")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim());
    const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]);
    const marks = [...svg.querySelectorAll(".bar path, .dot path")];
    const bars = marks.map((m) => ["an interval", m.getBoundingClientRect()]);
    boxes.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1
          || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) {
        found.push(`${text} leaves ${svg.ariaLabel}`);
      }
      for (const [other, its] of [...boxes.slice(i + 1), ...bars]) {
        if (!apart(box, its)) found.push(`${text} lies on ${other} in ${svg.ariaLabel}`);
      }
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, k, name == "hacked") for k, name in enumerate(NAMES)]
    rows = [
        {"step": i * 1000, "tiny": -2e-4 + i * 3e-5, "wide": i * 4e6 - 2e7, "near": 0.97 + i / 1e6}
        for i in range(1, 11)
    ]  # fmt: skip
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return write_run_report(runs, folder / "page.html")


@pytest.mark.parametrize("size", SIZES)
def test_labels_stay_apart(browser, report: Path, size: str) -> None:
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.locator("svg[role=img]").count() > 12
    assert page.evaluate(CLASHES) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    check_access(page)
    page.close()


def test_what_looks_for_clashes_finds_them(browser) -> None:
    """Two ticks on one another, and a label beyond its figure."""
    (curve,) = curves("s", [{"step": i, "x": i / 9} for i in range(10)])
    page = browser.new_page()
    page.set_content(f"<div style='width: 300px'>{curve.svg}</div>")
    assert page.evaluate(CLASHES) == []
    wider = re.sub(r">(0\.\d+)<", r">\1 \1 \1 \1<", str(curve.svg))
    page.set_content(f"<div style='width: 300px'>{wider}</div>")
    assert page.evaluate(CLASHES) != []
    moved = str(curve.svg).replace(
        ">training step<", " transform='translate(60 -17)'>training step<"
    )
    page.set_content(f"<div style='width: 300px'>{moved}</div>")
    assert page.evaluate(CLASHES) != []
    page.close()
