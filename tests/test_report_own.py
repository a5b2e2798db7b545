"""The report of one's own run: pictures or how to get them, files that were edited, labels."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_report import EVALUATION, Page, write
from test_report_runs import make_run
from test_train import recipe

from tiltflow.config.load import load_config
from tiltflow.evaluation.charts import curves
from tiltflow.evaluation.report import _best
from tiltflow.tasks import demo, report
from tiltflow.tasks.report import write_run_report
from tiltflow.tasks.train import run_training


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", 1, False)


@pytest.mark.long
@pytest.mark.timeout(60)
def test_a_run_that_is_given_by_two_paths_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No length of the paths tells them apart, and the page's name was looked for without end."""
    monkeypatch.chdir(tmp_path)
    page = report._place([Path("a"), tmp_path / "a", Path("b")])
    assert page == tmp_path / "report_a_b.html"


def test_a_report_of_two_runs_leaves_their_own_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed, False) for seed, name in enumerate(("a", "b"))]
    own = {write_run_report([run], None): run for run in runs}
    before = {page: page.read_text() for page in own}
    both = write_run_report(runs, None)
    assert both == tmp_path / "report_a_b.html"
    assert {page: page.read_text() for page in own} == before
    many = write_run_report(
        [runs[0], *(make_run(tmp_path / (20 * c), 3, False) for c in "cdefg")], None
    )
    assert many == tmp_path / "report_of_6_runs.html"


EDITED = {
    "a list": ("config.yaml", b"- a\n"),
    "YAML that is none": ("config.yaml", b"watch: ["),
    "Latin-1": ("config.yaml", b"stage: \xff\n"),
    "words for thresholds": ("config.yaml", b"watch: {rules: {drift: high}}\n"),
    "no finite threshold": ("config.yaml", b"watch: {rules: {drift: .inf}}\n"),
    "a list for rules": ("config.yaml", b"watch: {rules: [1]}\n"),
    "deep metrics": ("metrics.jsonl", b'{"step": 1, "a": ' + b"[" * 100_000 + b"\n{}\n"),
    "a deep look": ("watch.jsonl", b'{"step": 0, "alarms": {}, "values": {"drift": [[1]]}}\n'),
    "an empty look": ("watch.jsonl", b'{"step": 0, "alarms": {}, "values": {"drift": []}}\n'),
    "a NaN in a look": ("watch.jsonl", b'{"step": 0, "alarms": {}, "values": {"a": [NaN]}}\n'),
    "prompts of sheets in Latin-1": ("samples/prompts.txt", b"\xff\n"),
    "an odd question": ("evaluation.json", b'{"prompts": 1, "systems": {"a": {"nfe": 1, "scores": '
                        b'{}}}, "asked": {"tilt": "x"}}'),
    "a look of words": ("watch.jsonl", b'{"step": 0, "alarms": 3, "values": {"drift": ["x"]}}\n'),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_run_is_refused_in_a_sentence_that_names_the_file(run: Path, what: str) -> None:
    name, content = EDITED[what]
    (run / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        write_run_report([run], None)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("config", ["stage: tilt\nwatch:\n", "watch: 3\n", "watch: {rules: }\n"])
def test_a_config_without_rules_has_no_limits(run: Path, config: str) -> None:
    (run / "config.yaml").write_text(config)
    labels = [s["aria-label"] for s in Page(write_run_report([run], None).read_text()).all("svg")]
    assert labels and not any("limit 0." in str(label) for label in labels)


def test_numbers_beyond_a_float_are_no_curve(run: Path) -> None:
    lines = [json.dumps({"step": i, "loss": 1 / i, "huge": 10**400 + i}) for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = Page(write_run_report([run], None).read_text())
    assert [c for c in page.text("code") if c in ("loss", "huge")] == ["loss"]


def test_pictures_or_how_to_get_them(run: Path) -> None:
    assert "There are no pictures" not in write_run_report([run], None).read_text()
    (run / "evaluation.images" / "prompts.txt").unlink()
    with_sheets = Page(write_run_report([run], None).read_text())
    assert [str(i["alt"])[:5] for i in with_sheets.all("img")] == ["Sheet", "Sheet"]
    for sheet in (run / "samples").iterdir():
        sheet.unlink()
    page = Page(write_run_report([run], None).read_text())
    assert page.all("img") == []
    assert "log.samples_every=N" in page.text("code")


def test_the_last_sheet_is_drawn_whether_or_not_the_steps_divide(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    settings = recipe("cold_start", tiny_pipeline("sd35m"), prompts, tmp_path / "run")
    more = ["train.steps=3", "log.samples_every=2", "train.batch_size=2"]
    out = run_training(load_config("demo_cold_start", [*settings, *more]), Console(quiet=True))
    assert sorted(p.stem for p in (out / "samples").glob("*.png")) == [
        "step-000000", "step-000002", "step-000003"
    ]  # fmt: skip
    page = Page(write_run_report([out], None).read_text())
    assert [i["alt"] for i in page.all("img")] == [
        f"a {animal}, by run, step {step}" for animal in ("cat", "dog") for step in (0, 3)
    ]


DIGIT = 0.6 * 11.5
"""The width of a figure in the page's 11.5 pixels."""


@pytest.mark.parametrize(
    ("low", "high"),
    [(-2e-4, 1e-4), (-0.012, 0.001), (-999_000.0, 0.0), (-3e-6, 1e-6), (-2e7, 1e7), (0.97, 0.9702),
     (-150.02, -150.0), (0.0, 1.0)],
)  # fmt: skip
def test_labels_stay_clear_of_the_title(low: float, high: float) -> None:
    rows = [{"step": i, "x": low + (high - low) * i / 9} for i in range(10)]
    (curve,) = curves("s", rows)
    labels = re.findall(r'text-anchor: end[^"]*" x="([0-9.]+)"[^>]*>([^<]+)<', curve.svg)
    title = re.search(r'<text [^>]* x="([0-9.]+)"[^>]*rotate\(-90[^>]*>x<', curve.svg)
    assert len(labels) > 2 and title is not None
    assert all(float(x) - len(label) * DIGIT > float(title[1]) for x, label in labels)


def test_each_system_is_explained(tmp_path: Path) -> None:
    _, page = write(tmp_path)
    said = page.text("dt", "dd", "code")
    at = said.index("rtdmd")
    assert said[at + 1].startswith("stage 2: the student of stage 1, tilted to the rewards")
    scores = EVALUATION["systems"]["rtdmd"]
    names = ("teacher", "teacher_4_step", "rtdmd, run_a", "mine")
    asked = {"steps": 4, "teacher_steps": 50, "tilt": 0.5}
    systems = dict.fromkeys(names, scores)
    page = write(tmp_path, evaluation={"prompts": 3, "systems": systems, "asked": asked})[1]
    found = page.text("dd")
    assert found[0].endswith("(50 steps)") and found[1].endswith("(4 steps)")
    assert found[2].endswith("(4 steps), at the strength 0.5")
    assert "mine" not in page.text("code")


def test_a_mean_is_bold_where_every_comparison_says_so() -> None:
    systems = {
        name: {"scores": {"r": {"mean": mean}}} for name, mean in zip("abc", (1, 2, 3), strict=True)
    }
    row = {"reward": "r", "difference": 1.0, "p_value": 0.01}
    ahead, behind = row | {"a": "c", "b": "a"}, row | {"a": "b", "b": "c", "difference": -1.0}
    assert _best(systems, [ahead, behind]) == {"r": "c"}
    assert _best(systems, [ahead, behind | {"p_holm": 0.06}]) == {}
    assert _best(systems, []) == {}


def test_sheets_without_known_prompts_stay_whole(run: Path) -> None:
    """A medium of one's own lays out its samples itself, and a number of prompts may not fit."""
    prompts = run / "samples" / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    page = Page(write_run_report([run], None).read_text())
    cut = [i["alt"] for i in page.all("img") if "step" in str(i["alt"])]
    assert cut == [f"a {x}, by run, step {n}" for x in ("cat", "dog") for n in (0, 20)]
    for content in ("x\n" * 17, ""):  # three rows do not divide sixteen pixels
        prompts.write_text(content)
        page = Page(write_run_report([run], None).read_text())
        assert sum(str(i["alt"]).startswith("Sheet") for i in page.all("img")) == 2
    prompts.write_text("a cat\na dog\n")
    with (run / "config.yaml").open("a") as file:
        file.write("model: {medium: 'mine:sound'}\n")
    page = Page(write_run_report([run], None).read_text())
    assert sum(str(i["alt"]).startswith("Sheet") for i in page.all("img")) == 2


def test_one_notion_of_significance(tmp_path: Path) -> None:
    """The corrected p-value decides, the page says so, and the interval is called uncorrected."""
    source, page = write(tmp_path)
    assert any("p_holm" in row for row in EVALUATION["comparisons"])
    assert {"95% interval, not corrected", "corrected p-value"} <= set(page.text("th"))
    assert any("by them alone a difference is called significant" in t for t in page.text("p"))
    assert source.count("significant difference") == page.text("td").count(
        "no significant difference"
    )


def test_a_fast_demo_ends_with_a_line_that_its_figures_mean_nothing(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result:
        summary = EVALUATION

    for name, fake in (
        ("train_stage", lambda *given: None),
        ("evaluate_to", lambda *given: Result),
        ("write_run_report", lambda runs, out: runs[0] / "report.html"),
    ):
        monkeypatch.setattr(demo, name, fake)
    for fast in (True, False):
        (tmp_path / "tilt" / "export").mkdir(parents=True, exist_ok=True)
        said = io.StringIO()
        demo.run_demo(tmp_path, fast, False, Console(file=said, soft_wrap=True))
        last = said.getvalue().strip().splitlines()[-1]
        assert ("figures mean nothing" in last) == fast
        assert ("p = " in said.getvalue()) == (not fast)
        stage = shutil.copytree(run, tmp_path / "tilt", dirs_exist_ok=True)
        for told in (tmp_path, stage):  # `tiltflow report` of the demo, and of one stage
            page = Page(write_run_report([told], tmp_path / "page.html").read_text())
            assert ("figures mean nothing" in page.text("p")[0]) == fast


def test_a_notice_stands_at_the_top(tmp_path: Path, run: Path) -> None:
    from tiltflow.tasks.report import _write

    _, plain = write(tmp_path)
    assert not [p for p in plain.all("p") if p.get("id") == "notice"]
    page = Page(_write([run], run, "Nothing <b>here</b>").read_text())
    assert page.text("p")[0] == "Nothing <b>here</b>"


@pytest.mark.parametrize(
    ("evaluated", "exported", "said"),
    [
        ({"adapters": {"few_step": "a"}}, "a", False),
        ({"adapters": {"few_step": "a"}}, "b", True),
        ({}, "b", False),  # an earlier version's, which does not say
        ({"adapters": {"few_step": "a"}}, None, False),
    ],
)
def test_figures_of_an_earlier_student_are_said_to_be(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluated: dict[str, object],
    exported: str | None,
    said: bool,
) -> None:
    """A run that went on after its evaluation, and was exported again."""
    (run / "evaluation.json").write_text(json.dumps(EVALUATION | evaluated))
    if exported is not None:
        (run / "export" / "few_step").mkdir(parents=True)
    recipe = {"iterations": 20}
    contract = SimpleNamespace(hashes={"few_step": exported}, weights=None, recipe=recipe)
    monkeypatch.setattr(report, "read_contract", lambda place: contract)
    page = write_run_report([run], None).read_text()
    assert ("is of other weights than its export has now" in page) == said
    # nor has one that goes on been exported again: its curves and samples are of later
    for step in (20, 30):
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        later = bool(evaluated) and exported == "a" and step == 30
        notice = report._notice(run)
        assert ("is of iteration 20, and the run has gone on to 30: evaluate it" in notice) == later
