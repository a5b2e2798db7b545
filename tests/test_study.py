"""`tiltflow study`: equal budgets, cells that survive a kill, and what is said of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from evidence_figure import started
from torch import Tensor
from typer.testing import CliRunner

from tiltflow.cli.main import app
from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.evaluation.report import _verdict as report_verdict
from tiltflow.evaluation.seeds import compared, over_seeds
from tiltflow.setup.build import build_stage
from tiltflow.setup.costing import Cost, Counter, costs, within
from tiltflow.tasks.study import RESULT, Cell, cells_of, make_cells
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.study_table import (
    budgets,
    comparison_lines,
    summarise,
    verdict,
    write_study,
)
from tiltflow.tasks.train import train_run

STUDIES = Path(__file__).parents[1] / "studies"
SMALL = """
rows:
  ac_dmd: {recipe: mixture_cold_start, set: {cold_start.generator_every: 1}}
  rtdmd: {recipe: mixture_tilt, start: ac_dmd}
  draft: {recipe: mixture_tilt, start: ac_dmd, seeds: [1], set: {tilt.policy_weight: 0,
          tilt.matching_weight: 0, tilt.fake_score_updates: 0}}
seeds: [0, 1]
stages: {cold_start: {budget: 1500}, tilt: {budget: 2000, set: {tilt.group_size: 4,
         tilt.match_steps: last, tilt.fake_score_updates: 1}}}
set: {run.device: cpu, train.batch_size: 8, checkpoint.every: 2, log.every: 1}
prompts: shapes-heldout
count: 16
rewards: [linear]
reference: rtdmd
curves: [reward/linear]
"""


def taken(cfg: RunConfig, steps: int) -> Cost:
    return sum(islice(costs(cfg), steps), Cost())


def counted(cfg: RunConfig, steps: int) -> Cost:
    """The passes of the run's own networks."""
    build, counter = build_stage(cfg), Counter()
    backbone = build.backbone
    velocity = backbone.velocity

    def seen(network, x, sigma, cond, guidance=None):  # type: ignore[no-untyped-def]
        made: Tensor = velocity(network, x, sigma, cond, guidance)
        rows = len(x) * (1 if guidance is None else backbone.passes(guidance))
        return counter.saw(made, rows, "forward", "backward")

    backbone.velocity = seen  # type: ignore[method-assign]
    for step in range(steps):
        build.stage.iteration(step)
    return counter.take()


def test_the_stand_ins_passes_are_those_of_the_models_own_networks(tmp_path: Path) -> None:
    """On the embedded model, whose guided teacher takes two passes."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    cfg = load_config(
        "demo_cold_start",
        ["run.device=cpu", "train.batch_size=2", f"data.prompts={tmp_path}/prompts.txt",
         "data.cache=off", "watch.rewards={}", "run.seed=3"],
    )  # fmt: skip
    found = counted(cfg, 3)
    assert found.backward > 0 and found == taken(cfg, 3)


def test_the_stand_ins_passes_are_a_stage_2_runs(tmp_path: Path) -> None:
    short = ["run.device=cpu", "train.batch_size=8", "train.steps=1"]
    cold = train_run(load_config("mixture_cold_start", [f"run.out={tmp_path}/cold", *short]))
    more = [f"model.few_step={cold}", *short, "tilt.group_size=4", "train.micro_batch_size=4"]
    for options in (["tilt.match_steps=random"], ["tilt.keep_graph=true", "tilt.kl=0.1"]):
        cfg = load_config("mixture_tilt", [*more, *options])
        found, stand_in = counted(cfg, 4), taken(cfg, 4)
        assert (found.forward, found.backward) == (stand_in.forward, stand_in.backward)
        assert (stand_in.scored, stand_in.pulled) == (4 * 8, 4 * 8)


PASSES = {
    # 4 of the rollout; a step again with its graph, and back; the teacher twice, guided; the fake
    # score's own two passes a sample (γ, one sample), and back
    "ac_dmd_longer": (4 + 1 + 2 + 1 + 2, 1 + 2, 0),
    "dmd2": (4 + 1 + 3 + 5, 1 + 5, 0),
    "dmd2_gan": (4 + 1 + 3 + 5 + 2 + 51 / 8, 1 + 5, 0),
    "draft_1": (4 + 1, 1, 1),
    "grpo": (4 + 3, 3, 0),
    "flow_grpo_fast": (4 + 1, 1, 0),
    "mixgrpo": (4 + 2, 2, 0),
    "nft": (4 + 4, 4, 0),
    "rtdmd_2": (4 + 2 + 1 + 2 + 1 + 2, 3 + 2, 1),
    "rtdmd_no_matching": (4 + 2 + 1, 3, 1),
}


@pytest.mark.parametrize("row", PASSES)
def test_the_papers_rows_cost_what_their_methods_do(row: str, tmp_path: Path) -> None:
    """By hand, a sample and an iteration: forward, backward, and through the reward backward."""
    forward, backward, pulled = PASSES[row]
    cell = Cell(load_study(STUDIES / "paper.yaml"), tmp_path, row, 0)
    n = 2 * cell.config.train.batch_size
    assert taken(cell.config, 2) == Cost(int(n * forward), n * backward, n, n * pulled)


@pytest.mark.long
def test_two_recipes_get_equal_budgets(tmp_path: Path) -> None:
    study, found = load_study(STUDIES / "paper.yaml"), []
    for row in ("grpo", "rtdmd_2"):
        cell = Cell(study, tmp_path, row, 0)
        steps, cost = within(cell.config, 60_000)
        assert cost == taken(cell.config, steps) and cost.evaluations <= 60_000
        assert (cost + next(costs(cell.config))).evaluations > 60_000
        found.append({"stage": "tilt", "cost": vars(cost)})
    assert found[0]["cost"]["scored"] > 1.5 * found[1]["cost"]["scored"]
    assert budgets(found)["tilt"]["agree"]
    less = {"stage": "tilt", "cost": vars(Cost(forward=50_000))}
    assert not budgets([*found, less])["tilt"]["agree"]
    with pytest.raises(ValueError, match="100 network evaluations does not pay for one iteration"):
        within(Cell(study, tmp_path, "grpo", 0).config, 100)


def test_every_row_of_the_paper_is_in_order(tmp_path: Path) -> None:
    study = load_study(STUDIES / "paper.yaml")
    five = [row for row in study.rows if len(study.seeds_of(row)) == 5]
    assert five == ["ac_dmd", "a_dmd", "grpo", "rtdmd_1", "rtdmd_2"]
    for cell in cells_of(study, tmp_path, seeds=[0]):
        cfg = cell.config
        assert "shapes" in cfg.watch.rewards and "shapes" not in cfg.rewards
        trains = cfg.tilt.policy_weight > 0
        assert cfg.stage == "cold_start" or trains == (
            cell.row.startswith(("rtdmd", "grpo", "flow", "mix", "demo"))
        )


@pytest.mark.long
def test_the_tuning_runs_are_the_papers_rows_at_three_rates(tmp_path: Path) -> None:
    paper, tuning = (load_study(STUDIES / name) for name in ("paper.yaml", "tuning.yaml"))
    rates: dict[str, set[float]] = {}
    for row in tuning.rows:
        model = tuning.rows[row].like or row
        here, there = Cell(tuning, tmp_path, row, 0), Cell(paper, tmp_path, model, 0)
        change = ("scored", "train.generator_lr", "start.scored")
        apart = {k for k in here.asked if here.asked[k] != there.asked[k]}
        assert all(key.startswith(change) for key in apart), row
        rates.setdefault(model, set()).add(here.config.train.generator_lr)
    assert {len(found) for model, found in rates.items() if model != "ac_dmd"} == {3}
    used = {p.text for p in paper.scored()}
    assert not used & {p.text for p in tuning.scored()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    path.write_text(SMALL)
    return path


KILLED = """
import os, signal, sys
from pathlib import Path
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.study import cells_of, make_cells
from tiltflow.tasks.study_file import load_study

class Killed(Callbacks):
    def checkpoint(self, step, path):
        if "rtdmd" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

file, out = map(Path, sys.argv[1:])
make_cells(file, cells_of(load_study(file), out), callbacks=Killed())
"""


@pytest.mark.long
def test_a_killed_study_goes_on_as_if_it_had_not_been(file: Path, tmp_path: Path) -> None:
    study, whole, parts = load_study(file), tmp_path / "whole", tmp_path / "parts"
    assert make_cells(file, cells_of(study, whole))
    command = [sys.executable, "-c", KILLED, str(file), str(parts)]
    gone = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert gone.returncode == -signal.SIGKILL
    left = [cell for cell in cells_of(study, parts) if cell.result() is None]
    assert 0 < len(left) < 5 and load_checkpoint(parts / "rtdmd" / "seed-0" / "run").step == 2
    # the rest in pieces: one row of one seed, then all of it by the command
    assert make_cells(file, cells_of(study, parts, ["draft"], [1]))
    run = CliRunner().invoke(app, ["study", str(file), "--out", str(parts)])
    assert run.exit_code == 0, run.output
    for cell, other in zip(cells_of(study, whole), cells_of(study, parts), strict=True):
        assert (cell.folder / RESULT).read_bytes() == (other.folder / RESULT).read_bytes()
    summary = summarise(study, whole)
    pages = write_study(study, whole, summary)
    for page in pages[:2]:
        assert page.read_bytes() == (parts / page.name).read_bytes()
    assert summary["cells"] == {"done": 5, "of": 5}
    assert summary["budgets"]["cold_start"]["most"] <= 1500
    assert summary["budgets"]["tilt"]["most"] <= 2000
    assert {(c["a"], c["b"]) for c in summary["comparisons"]} == {
        ("ac_dmd", "rtdmd"), ("draft", "rtdmd")
    }  # fmt: skip
    assert "<svg" in pages[2].read_text() and "| draft | 1 |" in pages[1].read_text()
    # the results alone, as a repository keeps them, make the same table
    kept = tmp_path / "kept"
    for cell in cells_of(study, whole):
        (kept / cell.row / f"seed-{cell.seed}").mkdir(parents=True)
        shutil.copy(cell.folder / RESULT, kept / cell.row / f"seed-{cell.seed}" / RESULT)
    assert make_cells(file, cells_of(study, kept))
    for page in write_study(study, kept, summarise(study, kept))[:2]:
        assert page.read_bytes() == (whole / page.name).read_bytes()
    # and the study goes on from them: a run that is started from is trained again
    left = kept / "rtdmd" / "seed-1" / RESULT
    before, start = left.read_bytes(), kept / "ac_dmd" / "seed-1"
    scored = (start / RESULT).stat().st_mtime_ns
    left.unlink()
    assert make_cells(file, cells_of(study, kept, ["rtdmd"]))
    assert left.read_bytes() == before and (start / "run" / "config.yaml").is_file()
    assert (start / RESULT).stat().st_mtime_ns == scored
    assert not (kept / "ac_dmd" / "seed-0" / "run").exists()
    # another budget is another study
    file_2 = tmp_path / "other.yaml"
    file_2.write_text(SMALL.replace("budget: 2000", "budget: 3000"))
    with pytest.raises(ValueError, match=r"study has now \(budget: 2000 → 3000\)"):
        make_cells(file_2, cells_of(load_study(file_2), parts, ["rtdmd"]))


@pytest.mark.long
def test_the_quick_study_runs(tmp_path: Path) -> None:
    quick = STUDIES / "quick.yaml"
    run = CliRunner().invoke(app, ["study", str(quick), "--out", str(tmp_path)])
    assert run.exit_code == 0 and "6 of 6 cells" in run.output
    found = summarise(load_study(quick), tmp_path)
    assert [budget["agree"] for budget in found["budgets"].values()] == [True, True]


@pytest.mark.long
def test_cells_are_made_by_several_processes_at_once(file: Path, tmp_path: Path) -> None:
    study, one, two = load_study(file), tmp_path / "one", tmp_path / "two"
    assert make_cells(file, cells_of(study, one, ["rtdmd"]))
    assert make_cells(file, cells_of(study, two, ["rtdmd"]), jobs=2)
    for a, b in zip(cells_of(study, one), cells_of(study, two), strict=True):
        first, second = a.result(), b.result()
        assert (first is None) == (second is None) == (a.row == "draft")
        if first is not None and second is not None:  # sums of another number of threads
            assert np.allclose(first.pop("scores")["linear"], second.pop("scores")["linear"])
            assert first == second
    (two / "rtdmd" / "seed-0" / RESULT).unlink()
    (two / "rtdmd" / "seed-1" / RESULT).unlink()
    (two / "ac_dmd" / "seed-0" / "run" / "checkpoints" / "latest").unlink()
    (two / "rtdmd" / "seed-0" / "run" / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match="rtdmd, seed 0: tiltflow: .*log.txt"):
        make_cells(file, cells_of(study, two, ["rtdmd"]), jobs=2)


def test_means_and_differences_over_prompts_and_over_seeds() -> None:
    a = {0: np.array([1.0, 2.0, 3.0, 6.0]), 1: np.array([3.0, 4.0, 5.0, 8.0])}
    found = over_seeds(a)
    assert found["mean"] == 4.0 and found["by_seed"] == {"0": 3.0, "1": 5.0}
    # over seeds: 4 ± t(1 df) · 1; over prompts: of 2, 3, 4, 7
    assert np.allclose(found["seeds_ci95"], [4 - 12.7062, 4 + 12.7062], atol=1e-3)
    assert np.allclose(found["ci95"], [4 - 3.1824 * 1.0801, 4 + 3.1824 * 1.0801], atol=1e-3)
    b = {1: np.array([2.0, 2.0, 4.0, 6.0])}
    (row,) = compared({"a": {"r": a}, "b": {"r": b}}, [("a", "b")])
    assert row["seeds"] == [1] and row["difference"] == 1.5 and row["p_seeds"] is None
    assert row["p_holm"] == row["p_value"] and verdict(row) == "higher, of one seed"
    assert compared({"a": {"r": a}, "b": {"r": {2: b[1]}}}, [("a", "b")]) == []
    far = {"p_holm": 0.01, "difference": -1.0, "seeds": [0, 1], "seeds_ci95": [-2.0, 0.5]}
    assert verdict(far) == "lower, but the seeds' interval has 0 in it"


def test_rows_of_other_seeds_are_compared_on_those_that_both_have() -> None:
    """A row of two seeds, from a stage 1 of three, whose third seed is far off: neither a
    comparison, nor its line, the page's or the figure's mark has the third in it."""
    rng = np.random.default_rng(0)
    start = {seed: rng.normal(size=40) + (9.0 if seed == 2 else 0.0) for seed in (0, 1, 2)}
    row = {seed: start[seed] + 1 + 0.1 * rng.normal(size=40) for seed in (1, 0)}
    scores = {"ac_dmd": {"r": start}, "rtdmd": {"r": row}}
    systems = {
        name: {"seeds": list(of["r"]), "scores": {"r": over_seeds(of["r"])}}
        for name, of in scores.items()
    }
    (found,) = compared(scores, [("rtdmd", "ac_dmd")])
    assert found["seeds"] == [1, 0] and found["difference"] == pytest.approx(1, abs=0.1)
    each = [float((row[s] - start[s]).mean()) for s in (1, 0)]
    half = 12.7062 * abs(each[0] - each[1]) / 2  # t of one degree of freedom, s / √2
    assert found["seeds_ci95"] == pytest.approx([np.mean(each) - half, np.mean(each) + half])
    (line,) = comparison_lines({"comparisons": [found]})
    assert line.startswith(f"rtdmd − ac_dmd on r (seeds 1, 0): {found['difference']:+.4f}")
    assert report_verdict(found).seeds == "seeds 1, 0"
    alone = compared({**scores, "rtdmd": {"r": {0: row[0]}}}, [("rtdmd", "ac_dmd")])[0]
    assert report_verdict(alone).words.endswith(", of one seed")
    mark = started(systems, "rtdmd", "r")
    assert mark == pytest.approx(np.mean([start[0].mean(), start[1].mean()]))
    gain = systems["rtdmd"]["scores"]["r"]["mean"] - mark
    assert gain == pytest.approx(found["difference"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("reference: rtdmd", "reference: rtmd", "reference 'rtmd' is no row; did you mean 'rtdmd'"),
        ("start: ac_dmd}", "start: rtdmd}", "row 'rtdmd' starts from 'rtdmd', which starts itself"),
        ("mixture_cold_start,", "mixture_cold_start, seeds: [0],", "has the seed 1, but 'ac_dmd'"),
        ("count: 16", "count: 1", "count is 1, but it should be greater than"),
        ("rewards: [linear]", "", "rewards is not set"),
        ("rows:", "rose:", "rows is not set|no setting rose"),
        ("recipe: mixture_cold_start,", "", "row 'ac_dmd' has no recipe"),
        ("\nseeds: [0, 1]", "\nseeds: [0, 1, 0]", "seeds has 0 twice, which would count as two"),
        ("seeds: [1], set", "seeds: [1, 1], set", "seeds has 1 twice"),
        ("count: 16", "count: 16\nsteps: [4, 2, 4]", "steps has 4 twice"),
        ("rewards: [linear]", "rewards: [linear, linear]", "rewards has linear twice"),
        (
            "count: 16",
            "count: 16\ncompare: [[rtdmd, ac_dmd], [rtdmd, ac_dmd]]",
            "compare has rtdmd, ac_dmd twice",
        ),
        ("start: ac_dmd}", "start: ac_dmd, like: draft}", "is like 'draft', no row before it"),
    ],
)
def test_what_is_no_study_says_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "study.yaml"
    assert old in SMALL
    file.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        load_study(file)


def test_settings_of_a_row_are_wrong_before_anything_runs(file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    for old, new, said in (
        ("tilt.policy_weight: 0", "tilt.policy_wait: 0", "row 'draft': unknown key"),
        ("cold_start: {budget: 1500}, ", "", "row 'ac_dmd': stages has no cold_start"),
    ):
        wrong.write_text(SMALL.replace(old, new, 1))
        with pytest.raises(ValueError, match=said):
            make_cells(wrong, cells_of(load_study(wrong), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    study = load_study(file)
    with pytest.raises(ValueError, match="no row 'grpo'"):
        cells_of(study, tmp_path, ["grpo"])
    with pytest.raises(ValueError, match="no row of these has the seed 7"):
        cells_of(study, tmp_path, seeds=[7])
    with pytest.raises(ValueError, match="no finished cell"):
        summarise(study, tmp_path / "out")


def test_a_torn_result_is_said(file: Path, tmp_path: Path) -> None:
    cell = Cell(load_study(file), tmp_path, "ac_dmd", 0)
    cell.folder.mkdir(parents=True)
    for text in ("{", "[]", json.dumps({"row": "ac_dmd"})):
        (cell.folder / RESULT).write_text(text)
        with pytest.raises(ValueError, match="is no result of a study"):
            cell.result()


def test_a_result_is_read_by_a_later_version(file: Path, tmp_path: Path) -> None:
    """A setting that its version did not have counts as its default; another value is told,
    also where it is of the run that a row starts from."""
    cell = Cell(load_study(file), tmp_path, "rtdmd", 0)
    cell.folder.mkdir(parents=True)
    path, asked = cell.folder / RESULT, cell.asked
    assert asked["tilt.subset"] == 2 and asked["start.train.ema"] == asked["train.ema"]
    since = {"tilt.subset_order", "start.run.rank_timeout"}
    result = {"asked": {k: v for k, v in asked.items() if k not in since}, "row": "rtdmd"}
    assert len(result["asked"]) == len(asked) - 2
    path.write_text(json.dumps(result))
    assert cell.result() == result
    for key in ("tilt.subset", "start.train.ema", "since_removed", *since):
        path.write_text(json.dumps({"asked": asked | {key: 77}}))
        with pytest.raises(ValueError, match=rf"study has now \({key}: 77 → "):
            cell.result()
