"""One student for several numbers of sampler steps: an iteration is that of a run over its own."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from backbone_helpers import Tiny
from short_runs import SHORT, cold_start
from test_distributed import Runner, run, server  # noqa: F401
from test_distributed import home as home

from tiltflow.config.load import RunConfig, dump_config, load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.scheduler import CPSFlowMatchScheduler
from tiltflow.setup.build import Build, build_stage
from tiltflow.setup.costing import Counter, costs
from tiltflow.setup.planner import GIB
from tiltflow.tasks.plans import plan_recipe
from tiltflow.tasks.request import Request
from tiltflow.tasks.study import cells_of, make_cells
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.study_table import summarise, write_study
from tiltflow.tasks.train import train_run
from tiltflow.training.buckets import Bucketed
from tiltflow.training.optim import Updater
from tiltflow.training.parts import Parts
from tiltflow.training.terms import Epoch, Loss, Span, Term

SEVERAL = "sampler.steps=[2, 3, 8]"
GRIDS = (2, 3, 8)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_start(tmp_path_factory.mktemp("several") / "cold")


def config(stage: str, cold: Path, out: Path, *more: str) -> RunConfig:
    own = [f"model.few_step={cold}", "tilt.group_size=4", "tilt.subset=1"]
    options = [*SHORT, *(own if stage == "tilt" else ["cold_start.generator_every=1"]), *more]
    return load_config(f"mixture_{stage}", [f"run.out={out}", *options])


def weights(build: Build) -> dict[str, torch.Tensor]:
    state = build.stage.roles.state()
    return {f"{g}/{n}": w.clone() for g, inside in state.items() for n, w in inside.items()}


def drawn_steps(build: Build) -> dict[int, int]:
    """By number of sampler steps the first iteration that has it."""
    running = build.running
    assert isinstance(running, Bucketed)
    return {GRIDS[running.drawn(step)]: step for step in range(20, -1, -1)}


class Learns(Term):
    """A term that trains a role of its own."""

    name = "learns"

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @property
    def updaters(self) -> Mapping[str, Updater]:
        return {"own": self.parts.updater}

    def spans(self, step: int) -> tuple[Span, ...]:
        return ()

    def begin(self, epoch: Epoch) -> Loss:
        raise NotImplementedError


@pytest.mark.parametrize("fake_scores", ["shared", "per_boundary"])
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_an_iteration_is_that_of_a_run_with_its_steps(
    cold: Path, tmp_path: Path, stage: str, fake_scores: str
) -> None:
    """Losses, scores and the weights after it, bit for bit; a fake score of its own being that of
    the boundary of the grid."""
    asked = [f"train.fake_scores={fake_scores}", "train.boundary_power=1.0", "run.seed=5"]
    asked += ["tilt.match_steps=all"] if stage == "tilt" else []
    first = build_stage(config(stage, cold, tmp_path, *asked, SEVERAL))
    assert tuple(len(one.sigmas) - 1 for one in first.running.stages) == GRIDS  # type: ignore[attr-defined]
    assert len(first.stage.sigmas) == 9
    for steps, step in drawn_steps(first).items():
        several, alone = (
            build_stage(config(stage, cold, tmp_path, *asked, more))
            for more in (SEVERAL, f"sampler.steps={steps}")
        )
        before = weights(several)
        figures, expected = several.running.iteration(step), alone.running.iteration(step)
        assert all(torch.equal(figures[name], value) for name, value in expected.items())
        assert f"{steps}-step/generator/matching" in figures
        after, theirs = weights(several), weights(alone)
        offset = sum(k for k in GRIDS if k < steps)
        fakes = {n for n in after if re.match(r"fake_score/boundary\d", n)}
        assert bool(fakes) == (fake_scores == "per_boundary")
        for name, value in theirs.items():
            number = re.search(r"(?<=/boundary)\d+", name)
            here = name.replace(number[0], str(int(number[0]) + offset), 1) if number else name
            assert torch.equal(after[here], value), name
            fakes.discard(here)
        assert all(torch.equal(after[name], before[name]) for name in fakes)
        assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_a_resumed_run_is_the_uninterrupted_one(cold: Path, tmp_path: Path, stage: str) -> None:
    several = [SEVERAL, "train.schedule=constant"]
    whole = train_run(config(stage, cold, tmp_path / "whole", *several))
    half = tmp_path / "half"
    train_run(config(stage, cold, half, *several, "train.steps=2"))
    train_run(config(stage, cold, half, *several, "run.resume=true"))
    one, other = (load_checkpoint(made).tensors for made in (whole, half))
    assert all(torch.equal(w, other[g][n]) for g, inside in one.items() for n, w in inside.items())
    rows = read_metrics(whole / "metrics.jsonl")
    assert any("-step/generator/matching" in name for row in rows for name in row)
    with pytest.raises(ValueError, match=r"its sampler.steps is \[2, 3, 8\], but here it is 3"):
        train_run(config(stage, cold, half, "sampler.steps=3", "run.resume=true"))


def test_the_steps_are_drawn_alike_and_one_number_for_a_rollout(cold: Path, tmp_path: Path) -> None:
    chosen = [SEVERAL, "cold_start.generator_every=4", "cold_start.reuse=2"]
    running = build_stage(config("cold_start", cold, tmp_path, *chosen)).running
    assert isinstance(running, Bucketed)
    drawn = [running.drawn(step) for step in range(1200)]
    assert drawn[::2] == drawn[1::2]
    assert all(160 < drawn[::2].count(which) < 240 for which in range(3))  # 200 expected


def test_a_list_of_one_number_is_that_number(cold: Path, tmp_path: Path) -> None:
    one, plain = (
        config("cold_start", cold, tmp_path, f"sampler.steps={steps}") for steps in ("[4]", "4")
    )
    assert one == plain and one.sampler.steps == 4 and one.sampler.grids == (4,)
    build = build_stage(one)
    assert build.running is build.stage


@pytest.mark.long
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_two_ranks_are_one(cold: Path, run: Runner, tmp_path: Path, stage: str) -> None:  # noqa: F811
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config(stage, cold, tmp_path / "x", SEVERAL)))
    a, b = (load_checkpoint(run(f"several_{stage}_{n}", str(recipe), n)).tensors for n in (1, 2))
    for group in ("generator", "fake_score"):
        for name, value in a[group].items():
            assert torch.allclose(b[group][name], value, atol=1e-5), name


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ("cold_start", ["sampler.steps=[4, 2]"], "be in ascending order, each number once"),
        ("cold_start", ["sampler.steps=[2, 2]"], "be in ascending order, each number once"),
        ("cold_start", ["sampler.steps=[]"], "sampler.steps is"),
        ("cold_start", ["sampler.steps=[0, 2]"], "sampler.steps is 0, but it should be greater"),
        (
            "cold_start",
            ["sampler.steps=[2, 2.5]"],
            "sampler.steps is 2.5, but it should be",
        ),
        (
            "cold_start",
            ["sampler.steps=[1, 4]", "cold_start.reuse=2"],
            "cold_start.reuse 2 is more than the 1 boundaries of the smallest sampler.steps 1",
        ),
        (
            "tilt",
            ["sampler.steps=[1, 4]"],
            "tilt.subset 1 is more than the 0 stochastic steps of the smallest sampler.steps 1",
        ),
        (
            "tilt",
            ["sampler.steps=[2, 4]", "tilt.reward_steps=3"],
            "tilt.reward_steps 3 is more than the smallest sampler.steps 2",
        ),
    ],
)
def test_numbers_that_do_not_go_together_say_one_sentence(
    cold: Path, tmp_path: Path, stage: str, more: list[str], words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        config(stage, cold, tmp_path, *more)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_term_that_learns_itself_has_one_number_of_steps(cold: Path, tmp_path: Path) -> None:
    cfg = config("tilt", cold, tmp_path, SEVERAL, "tilt.terms={test_several_steps:Learns: {}}")
    with pytest.raises(ValueError, match="^sampler.steps: a term of tilt.terms that is trained"):
        build_stage(cfg)


def test_the_scheduler_takes_each_of_the_steps() -> None:
    scheduler = CPSFlowMatchScheduler(steps=[1, 2, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (1, 2, 4):
            scheduler.set_timesteps(steps)
    with pytest.warns(UserWarning, match="trained for 1 or 2 or 4 steps, not for 3: give num_in"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="it goes from 1 to"):
        CPSFlowMatchScheduler(steps=[0, 4])


@pytest.mark.long
def test_the_export_says_which_steps_and_samples_them(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    model = tiny_pipeline("sd35m")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    cfg = load_config(
        "sd35m_cold_start",
        [
            f"model.path={model}", "model.dtype=fp32", "model.resolution=32",
            "model.gradient_checkpointing=false", "model.autocast=null", "train.batch_size=2",
            "train.micro_batch_size=2", "train.steps=2", "adapters.rank=2", "run.device=cpu",
            f"data.prompts={tmp_path}/prompts.txt", "data.cache=off", "log.samples_every=0",
            "sampler.steps=[1, 2, 4]", f"run.out={tmp_path}/run", "watch.rewards={}",
            "train.fake_scores=per_boundary",
        ],
    )  # fmt: skip
    export = train_run(cfg) / "export"
    contract = json.loads((export / "contract.json").read_text())
    assert (contract["steps"], contract["several"], len(contract["sigmas"])) == (4, [1, 2, 4], 5)
    card = (export / "README.md").read_text()
    assert "in 1, 2 or 4 steps" in card and "num_inference_steps=4" in card
    assert "| sampler | 1, 2 or 4 steps, η = 0.9 |" in card
    scheduler = CPSFlowMatchScheduler.from_pretrained(export / "scheduler")
    assert list(scheduler.config.steps) == [1, 2, 4]
    for steps, note in ((None, ()), (2, ()), (3, ("warning: --steps is 3, but the student was "
                                                  "trained for 1, 2 or 4",))):  # fmt: skip
        asked = Request(str(model), [], few_step=export / "few_step", steps=steps)
        assert (asked.settled.steps, asked.settled.notes) == (steps or 4, note)


@pytest.mark.long
def test_a_plan_is_for_the_most_steps(tiny_pipeline: Tiny) -> None:
    model = [f"model.path={tiny_pipeline('sd35m')}", "data.prompts=p.txt", "run.device=cpu"]
    plans = [
        plan_recipe(load_config("sd35m_cold_start", [*model, f"sampler.steps={steps}"]))
        for steps in ("8", "[1, 8]", "2")
    ]
    assert plans[0] == plans[1] and plans[2].phases["rollout"] < plans[0].phases["rollout"] < GIB


STUDY = """
rows:
  two: {recipe: mixture_cold_start, set: {sampler.steps: 2}}
  both: {recipe: mixture_cold_start, set: {sampler.steps: [2, 3]}, budget: 800}
seeds: [0]
stages: {cold_start: {budget: 400}}
set: {run.device: cpu, train.batch_size: 8, checkpoint.every: 9, watch.rewards: {}}
prompts: shapes-heldout
count: 4
rewards: [linear]
steps: [2, 3]
reference: two
compare: [[both@3, two@2], [both, two]]
"""


@pytest.mark.long
def test_a_study_scores_its_students_at_several_numbers_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    study = load_study(file)
    cells = cells_of(study, tmp_path)
    assert make_cells(file, cells)
    summary = summarise(study, tmp_path)
    assert list(summary["systems"]) == ["two@2", "two@3", "both@2", "both@3"]
    assert [system["nfe"] for system in summary["systems"].values()] == [2, 3, 2, 3]
    assert [(row["a"], row["b"]) for row in summary["comparisons"]] == [
        ("both@3", "two@2"), ("both@2", "two@2"), ("both@3", "two@3")
    ]  # fmt: skip
    assert list(summary["budgets"]) == ["cold_start at 400", "cold_start at 800"]
    least = [budget["least"] for budget in summary["budgets"].values()]
    assert 200 < least[0] <= 400 < least[1] <= 800
    assert not list(tmp_path.rglob("parts*"))
    write_study(study, tmp_path, summary)
    assert "| both@3 | 1 |" in (tmp_path / "study.md").read_text()
    for old, new, said in (
        ("both@3,", "both@4,", "compare 'both@4' is at none of the study's steps"),
        ("both@3,", "boat@3,", "compare 'boat' is no row"),
    ):
        file.write_text(STUDY.replace(old, new, 1))
        with pytest.raises(ValueError, match=said):
            load_study(file)


@pytest.mark.long
def test_the_passes_of_several_steps_are_counted_before_the_run(cold: Path, tmp_path: Path) -> None:
    cfg = config("cold_start", cold, tmp_path, SEVERAL, "cold_start.reuse=2", "run.seed=7")
    build, counter = build_stage(cfg), Counter()
    velocity = build.backbone.velocity

    def seen(network, x, sigma, cond, guidance=None):  # type: ignore[no-untyped-def]
        made = velocity(network, x, sigma, cond, guidance)
        return counter.saw(made, len(x), "forward", "backward")

    build.backbone.velocity = seen  # type: ignore[method-assign]
    for step, cost in zip(range(12), costs(cfg), strict=False):
        build.running.iteration(step)
        assert counter.take() == cost
