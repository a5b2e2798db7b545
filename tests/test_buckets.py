"""Several sizes of pictures in one run: each iteration is that of a run over its size alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from backbone_helpers import Tiny
from lengths import mostly_long
from recording import Recording
from rich.console import Console
from test_distributed import Runner, run, server  # noqa: F401
from test_distributed import home as home
from test_graphs import stage as recorded_stage
from torch._dynamo.utils import counters

from tiltflow.config.load import RunConfig, dump_config, load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.core.sizes import said
from tiltflow.data.buckets import by_column
from tiltflow.data.prompts import Prompt
from tiltflow.models.compiled import compile_blocks
from tiltflow.models.graphs import Graphs
from tiltflow.setup.build import Build, build_stage
from tiltflow.setup.checks import check_run
from tiltflow.tasks.report import write_run_report
from tiltflow.tasks.train import _say_other_size, run_training
from tiltflow.training.buckets import Bucketed

QUIET = Console(quiet=True)
SIZES = [(32, 48), (48, 32), 32]
LIST = "data.buckets=[[32, 48], [48, 32], 32]"
Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A recipe of the tiny FLUX, whose grid of noise levels depends on the size."""
    place = tmp_path_factory.mktemp("buckets")
    rows = [{"prompt": f"cat {i}", "size": [[32, 48], "48x32", 32][i % 3]} for i in range(6)]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = [
        f"model.path={tiny_pipeline('flux_dev')}", "model.family=flux", "model.resolution=32",
        "model.dtype=fp32", "model.max_sequence_length=8", "model.autocast=null",
        "model.gradient_checkpointing=false", f"data.prompts={place}/prompts.jsonl",
        "data.cache=off", "adapters.rank=2", "train.steps=4", "train.batch_size=4",
        "train.micro_batch_size=2", "checkpoint.every=2", "log.every=1", "log.samples_every=0",
        "watch.rewards={}", "run.device=cpu", "run.seed=3",
    ]  # fmt: skip

    def make(stage: str, out: Path, *more: str) -> RunConfig:
        own = ["cold_start.generator_every=1"]
        if stage == "tilt":
            own = [
                f"model.few_step={place}/cold", "tilt.group_size=2", "tilt.matching_weight=1.0",
                "rewards={'test_buckets:brightness': {weight: 1.0}}", "tilt.reward_weight=1.0",
            ]  # fmt: skip
        return load_config(f"flux1_dev_{stage}", [*base, *own, f"run.out={out}", *more])

    run_training(make("cold_start", place / "cold", "train.steps=1"), QUIET)
    return make


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


def built(cfg: RunConfig) -> Build:
    return build_stage(cfg)


def weights(build: Build) -> dict[str, torch.Tensor]:
    state = build.stage.roles.state()
    return {f"{g}/{n}": w.clone() for g, inside in state.items() for n, w in inside.items()}


@pytest.mark.parametrize("stage", mostly_long(["cold_start", "tilt"], "tilt"))
def test_an_iteration_is_that_of_a_run_over_its_size(
    config: Config, tmp_path: Path, stage: str
) -> None:
    """Losses, scores and the weights after it, bit for bit; and it is not another size's."""
    first = built(config(stage, tmp_path, LIST)).running
    assert isinstance(first, Bucketed) and first.names == tuple(map(said, SIZES))
    steps = {first.drawn(step): step for step in range(20, -1, -1)}
    assert set(steps) == {0, 1, 2}
    seen = []
    for which, step in steps.items():
        size = SIZES[which]
        plain = json.dumps(size)
        mixed, alone = (
            built(config(stage, tmp_path, more)) for more in (LIST, f"model.resolution={plain}")
        )
        before = weights(mixed)
        figures, expected = mixed.running.iteration(step), alone.running.iteration(step)
        for name, value in expected.items():
            assert torch.equal(figures[name], value), name
        extra = {name for name in figures if name not in expected}
        assert f"{said(size)}/generator/matching" in extra
        assert all(name.startswith(f"{said(size)}/") for name in extra)
        after, theirs = weights(mixed), weights(alone)
        assert all(torch.equal(after[name], theirs[name]) for name in theirs)
        assert any(not torch.equal(after[name], before[name]) for name in before)
        shapes = [s.latent_shape for s in first.stages]
        assert tuple(alone.backbone.latent_shape) == tuple(shapes[which])
        seen.append(first.stages[which].sigmas.tolist())
    assert seen[0] == seen[1] or seen[0] == seen[2] or seen[1] == seen[2]  # as many tokens
    assert len({tuple(grid) for grid in seen}) == 2  # and another grid for another number


def finals(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_checkpoint(directory).tensors
    return {f"{g}/{n}": w for g, inside in tensors.items() for n, w in inside.items()}


@pytest.mark.parametrize("stage", mostly_long(["cold_start", "tilt"], "cold_start"))
def test_a_resumed_run_is_the_uninterrupted_one(config: Config, tmp_path: Path, stage: str) -> None:
    whole = run_training(config(stage, tmp_path / "whole", LIST), QUIET)
    half = tmp_path / "half"
    run_training(config(stage, half, LIST, "train.steps=2"), QUIET)
    run_training(config(stage, half, LIST, "run.resume=true"), QUIET)
    one, other = finals(whole), finals(half)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = read_metrics(whole / "metrics.jsonl")
    names = {name.split("/")[0] for row in rows for name in row if "x" in name.split("/")[0]}
    assert names <= {"32x48", "48x32"} and names
    contract = json.loads((whole / "export" / "contract.json").read_text())
    assert (contract["resolution"], contract["sizes"]) == (32, [[32, 48], [48, 32], 32])
    page = write_run_report([whole], None).read_text()
    drawn = [name for name in names if sum(f"{name}/generator/matching" in row for row in rows) > 1]
    assert drawn and all(f"{name}/generator/matching" in page for name in drawn)


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["replicated", "fsdp2"])
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_two_ranks_are_one(
    config: Config,
    run: Runner,  # noqa: F811
    tmp_path: Path,
    stage: str,
    sharding: str,
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_config(config(stage, tmp_path / "x", LIST)))
    made = [
        run(f"buckets_{stage}_{sharding}_{n}", str(tmp_path / "recipe.yaml"), n, *more)
        for n, more in ((1, []), (2, [f"run.sharding={sharding}"]))
    ]
    a, b = map(finals, made)
    for name in (n for n in a if n.startswith(("generator/", "fake_score/"))):
        assert torch.allclose(a[name], b[name], atol=1e-5), name


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_take_every_size(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding, and within torch's limit of recompilations, past which it would raise."""
    sizes = "data.buckets=[[32, 48], [48, 32], 32, 48, [16, 64]]"
    in_short = partial(compile_blocks, backend="aot_eager")
    monkeypatch.setattr("tiltflow.setup.build.compile_blocks", in_short)
    plain, fast = (
        built(config("cold_start", tmp_path, sizes, f"model.compile={on}"))
        for on in ("false", "true")
    )
    assert isinstance(plain.running, Bucketed)
    before = counters["stats"]["unique_graphs"]
    steps = {plain.running.drawn(step): step for step in range(60, -1, -1)}
    assert len(steps) == 5
    for step in steps.values():
        expected, found = plain.running.iteration(step), fast.running.iteration(step)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
        for role in ("generator", "fake_score"):  # rounding does not add up from step to step
            getattr(fast.stage.roles, role).load(getattr(plain.stage.roles, role).state())
    assert counters["stats"]["unique_graphs"] > before


@pytest.mark.long
def test_recorded_passes_are_of_their_size(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.graphs`: the same bits, and recordings for each size of its own."""
    graphs, found = Graphs(Recording()), []
    for on in (False, True):
        monkeypatch.setattr(
            "tiltflow.setup.build.graphs_for", lambda *_, g=on: graphs if g else None
        )
        more = "data.buckets=[[64, 32], 32]"
        build = recorded_stage(tiny_pipeline, tmp_path, "cold_start", on, more)
        assert isinstance(build.running, Bucketed)
        steps = {build.running.drawn(step): step for step in range(9, -1, -1)}
        recordings = []
        for step in steps.values():
            for _ in range(2):  # recorded, then replayed
                build.running.iteration(step)
            recordings.append(len(graphs))
        found.append(weights(build))
    assert set(steps) == {0, 1} and 0 < recordings[0] < recordings[1]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_column_of_the_prompt_file_gives_each_prompt_its_size(
    config: Config, tmp_path: Path
) -> None:
    build = built(config("cold_start", tmp_path, "data.buckets=size"))
    running = build.running
    assert isinstance(running, Bucketed) and running.names == tuple(map(said, SIZES))
    assert running.weights == (2, 2, 2)
    for which, stage in enumerate(running.stages):
        drawn = stage.sampler.indices(0, 8)
        assert {i % 3 for i in drawn} == {which} and len(set(drawn)) == 2
    running.iteration(0)
    assert build.facts.as_json()["sizes"] == tuple(SIZES)
    assert "sizes" not in built(config("cold_start", tmp_path)).facts.as_json()


def test_samples_of_a_size_that_nothing_is_trained_on_are_said(
    config: Config, tmp_path: Path
) -> None:
    drawn = ["log.samples_every=1", "log.samples=1"]
    for more, told in (
        ([LIST, *drawn, "model.resolution=64"], 1),
        ([LIST, "model.resolution=64"], 0),  # there are none
        ([LIST, *drawn], 0),
        (drawn, 0),
    ):
        lines: list[str] = []
        _say_other_size(built(config("cold_start", tmp_path, *more)), lines.append)
        assert len(lines) == told, more
        said_so = "warning: samples and the watch are of 64 pixels (model.resolution), which data."
        assert all(line.startswith(said_so) for line in lines)


def test_sizes_are_drawn_by_their_weights(config: Config, tmp_path: Path) -> None:
    chosen = "data.buckets=[{size: [32, 48], weight: 3}, 32]"
    running = built(config("cold_start", tmp_path, chosen)).running
    assert isinstance(running, Bucketed)
    drawn = [running.drawn(step) for step in range(400)]
    assert 0.68 < drawn.count(0) / 400 < 0.82  # 3 in 4, within three standard deviations
    assert drawn == [running.drawn(step) for step in range(400)]
    chosen = [LIST, "cold_start.generator_every=4", "cold_start.reuse=2"]
    running = built(config("cold_start", tmp_path, *chosen)).running
    assert isinstance(running, Bucketed)
    pairs = [(running.drawn(step), running.drawn(step + 1)) for step in range(0, 40, 2)]
    assert all(a == b for a, b in pairs)  # a rollout's iterations have its size


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        (
            "[[32, 40], 32]",
            "data.buckets: the size 32x40 must be in both sides a positive multiple",
        ),
        ("shape", "data.buckets: prompt 1 has no size as 'shape': a side, [height, width] or"),
    ],
)
def test_a_size_that_does_not_fit_says_one_sentence(
    config: Config, tmp_path: Path, buckets: str, words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check_run(config("cold_start", tmp_path / "run", f"data.buckets={buckets}"))
    assert str(caught.value).startswith(words)


def test_what_is_no_bucket_says_one_sentence() -> None:
    for value, words in (
        ("[[64, 96], [64, 96]]", "data.buckets has 64x96 twice: give it a weight instead"),
        ("[[64, 95]]", "data.buckets has 64x95, which is no multiple of 8"),
        ("[]", "data.buckets is [], but it should have at least 1 item"),
        ("[{size: 64, weight: 1e308}]", "data.buckets.weight is 1e+308, but it should be less"),
        (
            "[32, {size: 64, wieght: 2}]",
            "unknown key data.buckets.wieght; the nearest is data.buckets.weight",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            load_config("sd3m_cold_start", ["data.prompts=p.txt", f"data.buckets={value}"])
        assert str(caught.value).startswith(words)
    with pytest.raises(ValueError, match="sizes of pictures, and the mixture makes none"):
        load_config("mixture_cold_start", ["data.buckets=[64]"])
    for size in (0, 10**9, "2x", [64], True, [True, 64], "999999997x64x64", [0, 64, 64]):
        with pytest.raises(ValueError, match="data.buckets: prompt 1"):
            by_column("size", [Prompt("a", {"size": size})])
