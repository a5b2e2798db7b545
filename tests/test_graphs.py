"""Recorded work: results and gradients are those of the work done by hand, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recording import Recording
from test_train import redness  # noqa: F401  (a reward by dotted path)
from torch import Tensor, nn

from tiltflow.config.load import load_config
from tiltflow.models.graphs import Graphs, graphs_for
from tiltflow.setup import build as building
from tiltflow.setup.build import Build, build_stage

Tiny = Callable[[str], Path]


def left(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """The gradients, which are then forgotten as an optimizer step forgets them."""
    found = [None if p.grad is None else p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("calls", [1, 3])
def test_results_follow_inputs_and_weights_and_gradients_add_up(calls: int) -> None:
    """Over several rounds of so many micro-batches, with weights that change in between; results
    of an earlier call stay what they are, and a weight without a gradient has none."""
    torch.manual_seed(0)
    layer, idle = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
    trained, graphs = [*layer.parameters(), idle], Graphs(Recording())

    def work(given: dict[str, Tensor]) -> Tensor:
        y = layer(given["x"]).square().mean(1)
        y.sum().backward()
        return y.detach()

    for number in range(3):
        batches = [{"x": torch.randn(5, 3)} for _ in range(calls)]
        by_hand, expected = [work(x) for x in batches], left(trained)
        replayed, found = [graphs.run("a", work, x, trained) for x in batches], left(trained)
        assert same(replayed, by_hand) and same(found, expected)
        assert idle.grad is None and len(graphs) == 1
        with torch.no_grad():
            layer.weight.add_(0.1 * (number + 1))


def test_a_gradient_that_was_there_is_added_to() -> None:
    layer, graphs = nn.Linear(3, 2), Graphs(Recording())
    trained = list(layer.parameters())

    def work(x: Tensor) -> Tensor:
        layer(x).sum().backward()
        return x + 1

    x = torch.randn(4, 3)
    for _ in range(2):  # recording itself, and a replay
        work(x), work(x)
        expected = left(trained)
        work(x), graphs.run("a", work, x, trained)
        assert same(left(trained), expected)


def test_other_shapes_and_keys_are_recorded_by_themselves() -> None:
    graphs = Graphs(Recording())
    for key, rows in (("a", 2), ("a", 3), ("b", 2), ("a", 2)):
        graphs.run(key, lambda x: x * 2, torch.ones(rows))
    assert len(graphs) == 3


def test_a_host_that_reads_cannot_be_recorded() -> None:
    with pytest.raises(AssertionError, match="makes the host wait"):
        Graphs(Recording()).run("a", lambda x: x * float(x.sum()), torch.ones(2))


def stage(tiny: Tiny, out: Path, name: str, graphs: bool, *more: str) -> Build:
    (out / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    values = [
        f"model.path={tiny('sd35m')}", "model.resolution=64", "model.max_sequence_length=24",
        "train.batch_size=4", "train.micro_batch_size=2", f"data.prompts={out / 'prompts.txt'}",
        "data.cache=off", "run.device=cpu", f"run.out={out / 'run'}", "adapters.rank=4",
        f"model.graphs={str(graphs).lower()}",
    ]  # fmt: skip
    if name == "tilt":
        from students import student

        few_step = student(tiny, "sd35m", out / f"student{graphs}").export / "few_step"
        values += [f"model.few_step={few_step}", "tilt.group_size=2"]
        values += ["rewards={'test_train:redness': {weight: 1.0, options: {differentiable: true}}}"]
    else:
        values += ["cold_start.generator_every=2"]
    return build_stage(load_config(f"sd35m_{name}", [*values, *more]))


def weights(build: Build, first: int, last: int) -> dict[str, Tensor]:
    for step in range(first, last):
        build.stage.iteration(step)
    assert not build.stage.guard.failures()
    tables = dict(build.stage.roles.state())
    for name, updater in build.stage.updaters.items():
        tables[f"optimizer_{name}"] = updater.state()
    return {f"{k}/{n}": v.clone() for k, table in tables.items() for n, v in table.items()}


PLAIN = ["model.gradient_checkpointing=false", "train.fake_scores=per_boundary"]
KEPT = ["cold_start.keep_graph=true", "cold_start.fresh_boundary=false"]
STAGES = [
    pytest.param("cold_start", [], marks=pytest.mark.long),
    pytest.param("cold_start", PLAIN, marks=pytest.mark.long),
    pytest.param("cold_start", KEPT, marks=pytest.mark.long),
    pytest.param("tilt", [], marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "more"), STAGES)
def test_a_stage_has_the_same_bits_recorded(
    tiny_pipeline: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    more: list[str],
) -> None:
    engine = Recording()
    monkeypatch.setattr(
        building, "graphs_for", lambda device, wanted: Graphs(engine) if wanted else None
    )
    by_hand = weights(stage(tiny_pipeline, tmp_path, name, False, *more), 0, 4)
    build = stage(tiny_pipeline, tmp_path, name, True, *more)
    recorded = weights(build, 0, 4)
    assert all(torch.equal(recorded[key], value) for key, value in by_hand.items())
    graphs = build.stage.roles.generator.graphs
    assert graphs is not None and engine.replays > 2 * len(graphs) > 0


EIGHT = ["model.base_storage=fp8", "model.gradient_checkpointing=true"]


@pytest.mark.long
def test_a_base_in_8_bits_is_not_recorded(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its matrices lie elsewhere after each pass: a graph would read what others have there."""
    monkeypatch.setattr(
        building, "graphs_for", lambda device, wanted: Graphs(Recording()) if wanted else None
    )
    for more, recorded in (([], True), (EIGHT, False)):
        build = stage(tiny_pipeline, tmp_path, "cold_start", False, "model.graphs=auto", *more)
        assert (build.stage.roles.generator.graphs is not None) == recorded


def test_passes_outside_of_an_iteration_are_not_recorded(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples and looks of the watch have other shapes, each of which would keep its memory."""
    graphs = Graphs(Recording())
    monkeypatch.setattr(building, "graphs_for", lambda device, wanted: graphs)
    build = stage(tiny_pipeline, tmp_path, "cold_start", True)
    cond, _ = build.prompts.select([0, 1, 2], build.backbone.device)
    x = torch.randn(3, *build.backbone.latent_shape)
    with torch.no_grad():
        build.stage.roles.ema(x, torch.full((3,), 0.5), cond)
    assert len(graphs) == 0


def test_there_are_graphs_on_a_gpu_alone() -> None:
    assert graphs_for(torch.device("cpu"), True) is None
    assert graphs_for(torch.device("cuda"), False) is None
    assert isinstance(graphs_for(torch.device("cuda"), True), Graphs)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.compile=true"], "exclude each other"),
        (["adapters.kind=copies"], "needs adapters.kind lora"),
        (["run.sharding=fsdp2"], "run.sharding replicated"),
        (EIGHT, "model.base_storage fp8 exclude each other"),
        (["model.family=flux"], "pipelines of family sd3"),
    ],
)
def test_what_cannot_be_recorded_is_refused(more: list[str], message: str) -> None:
    values = ["model.graphs=true", "data.prompts=x", "run.out=x", *more]
    with pytest.raises(ValueError, match=message):
        load_config("sd35m_cold_start", values)
