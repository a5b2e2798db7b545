"""`model.gradient_checkpointing=auto`: which plan, kept in the run, refused where it is too big."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lengths import mostly_long
from rich.console import Console

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.evaluation.watch.probes import FixedPrompts
from tiltflow.setup.planner import GIB, OVERHEAD, Plan
from tiltflow.tasks import planning
from tiltflow.tasks.failures import explained
from tiltflow.tasks.planning import choices, chosen, fastest, sized, sizes
from tiltflow.tasks.plans import Plans, plan_recipe
from tiltflow.tasks.train import run_training

Tiny = Callable[[str], Path]
SIZES = {"decoder": 2 * GIB, "generator": 4 * GIB, "fake_score": 8 * GIB}


def config(*more: str, stage: str = "cold_start") -> RunConfig:
    values = ["model.gradient_checkpointing=auto", "data.prompts=x", "run.out=x", *more]
    if stage == "tilt":
        values += ["rewards={shapes: 1.0}", "model.few_step=y"]
    return load_config(f"sd35m_{stage}", values)


def planned(cfg: RunConfig) -> Plan:
    """Each part takes its size unless it is recomputed."""
    kept = [size for part, size in SIZES.items() if part not in cfg.model.checkpointed]
    return Plan({"base weights": GIB}, {"iteration": sum(kept)}, 0)


def fixed(plan: Callable[[RunConfig], Plan]) -> type[Plans]:
    """`Plans` that are made by `plan`."""
    return type("Fixed", (Plans,), {"__call__": lambda self, cfg: plan(cfg)})


def memory(gib: float) -> float:
    return (gib * GIB + OVERHEAD) / planning.USED


@pytest.mark.parametrize(
    ("stage", "gib", "parts"),
    [
        ("cold_start", 15, ()),
        ("cold_start", 11.1, ("generator",)),
        ("cold_start", 9, ("fake_score",)),
        ("cold_start", 3.1, ("fake_score", "generator")),
        ("cold_start", 1, ("fake_score", "generator")),
        ("tilt", 13.1, ("decoder",)),
        ("tilt", 1.1, ("decoder", "fake_score", "generator")),
    ],
)
def test_the_least_work_that_fits_is_chosen(stage: str, gib: float, parts: tuple) -> None:
    """Of stage 1, where the generator is differentiated once in ten iterations, it goes first."""
    found = list(choices(config(stage=stage)))
    assert found[0] == () and len(found) == len(set(found)) == (4 if stage == "cold_start" else 8)
    assert set(fastest(config(stage=stage), memory(gib), planned)[0]) == set(parts)


def test_a_base_in_8_bits_leaves_no_choice() -> None:
    cfg = config("model.base_storage=fp8")
    assert list(choices(cfg)) == [("fake_score", "generator")]


def test_where_memory_is_not_known_everything_is_recomputed() -> None:
    assert fastest(config(), None, planned) == (("fake_score", "generator"), None)


def test_a_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a larger device it goes on as it began; on a smaller one it is refused, or planned anew
    and said so."""
    monkeypatch.setattr(planning, "Plans", fixed(planned))
    said: list[str] = []

    def at(gib: float, goes_on: bool, *more: str) -> frozenset[str]:
        cfg = chosen(config(*more), tmp_path, goes_on, memory(gib), ALONE, said.append)
        return cfg.model.checkpointed

    assert at(9, False) == {"fake_score"}
    assert said == [f"gradient_checkpointing=auto recomputes fake_score: 7.0 GiB of the device's "
                    f"{memory(9) / GIB:.1f}"]  # fmt: skip
    assert at(100, True) == {"fake_score"} and len(said) == 1
    with pytest.raises(ValueError, match=r"needs 7\.0 GiB and this device has .* run\.replan=true"):
        at(1, True)
    assert at(1, True, "run.replan=true") == {"fake_score", "generator"}
    assert said[1].startswith("planned anew: ")
    assert json.loads((tmp_path / "plan.json").read_text())["bytes"] == GIB + 2 * GIB
    assert at(100, True) == {"fake_score", "generator"}
    assert at(100, False) == frozenset()


def test_a_run_that_began_though_nothing_fitted_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused on its own device: its plan takes more than there is, by its own count."""
    monkeypatch.setattr(planning, "Plans", fixed(planned))

    def at(memory: float, goes_on: bool) -> frozenset[str]:
        cfg = chosen(config(), tmp_path, goes_on, memory, ALONE, lambda line: None)
        return cfg.model.checkpointed

    least = {"fake_score", "generator"}
    assert at(2.9 * GIB, False) == least  # the plan says 3
    assert at(2.9 * GIB, True) == at(80 * GIB, True) == least
    with pytest.raises(ValueError, match=r"needs 3\.0 GiB and this device has 2\.8 GiB"):
        at(2.8 * GIB, True)
    kept = json.loads((tmp_path / "plan.json").read_text())
    del kept["memory"]
    (tmp_path / "plan.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"needs 3\.0 GiB"):
        at(2.9 * GIB, True)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["cold_start", "tilt"])
def test_a_rank_is_planned_with_its_share_of_the_batch(stage: str, tiny_pipeline: Tiny) -> None:
    """It was planned with the batch of all: graphs that are kept would not fit, where they do."""

    def tiny(batch: int, micro: int) -> RunConfig:
        keep = f"{stage}.keep_graph=true"
        more = (
            ["cold_start.fresh_boundary=false"] if stage == "cold_start" else ["tilt.group_size=4"]
        )
        return config(
            f"model.path={tiny_pipeline('sd35m')}", "model.resolution=64", "watch.rewards={}",
            "model.gradient_checkpointing=false", f"train.batch_size={batch}", keep, *more,
            f"train.micro_batch_size={micro}", stage=stage,
        )  # fmt: skip

    whole, share = tiny(32, 4), tiny(8, 4)
    assert Plans(whole, 4)(whole) == Plans(share)(share)
    assert Plans(whole, 4)(whole).peak < Plans(whole)(whole).peak
    uneven = Plans(tiny(32, 4), 5)(tiny(32, 4))  # of 32 the largest share is 7, of three prompts
    assert Plans(share)(share).peak == pytest.approx(uneven.peak, rel=0.05)


class First(Ranks):
    """The first of ranks that are all alike."""

    def total(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def least(self, value: float) -> float:
        return value


class Shares(Plans):
    """8 GiB of the batch, which ranks share, and 1 beside it."""

    def __call__(self, cfg: RunConfig) -> Plan:
        return Plan({"latents": 8 * GIB // self.ranks}, {"rollout": GIB}, 0)


def test_a_run_goes_on_on_fewer_ranks_where_what_each_then_has_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "Plans", Shares)

    def at(gib: float, ranks: Ranks, goes_on: bool = True) -> None:
        chosen(config(), tmp_path, goes_on, memory(gib), ranks, lambda line: None)

    at(3, First(0, 8), goes_on=False)
    assert json.loads((tmp_path / "plan.json").read_text())["bytes"] == 2 * GIB
    at(3, First(0, 8))
    at(5, First(0, 2))
    with pytest.raises(ValueError, match=r"needs 9\.0 GiB and this device has"):
        at(3, ALONE)
    at(12, ALONE)


class Beside(Ranks):
    """A rank whose job is threads of this process."""

    def total(self, values: Sequence[float]) -> list[float]:
        SAID[self.rank] = list(values)
        MEETING.wait(10)
        found = [sum(column) for column in zip(*SAID.values(), strict=True)]
        MEETING.wait(10)
        return found


SAID: dict[int, list[float]] = {}
MEETING = threading.Barrier(2)


@pytest.mark.parametrize("order", [(100, 9), (9, 100)])
def test_ranks_of_unequal_devices_plan_for_the_smallest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    """Rank 0's plan was that of all: on a larger device than another rank's it did not fit there.
    And a plan that was too large for one rank was refused by that one alone."""
    monkeypatch.setattr(planning, "Plans", fixed(planned))
    lines: list[str] = []

    def at(gib: tuple[int, int], goes_on: bool) -> list[frozenset[str] | str]:
        def rank(number: int) -> frozenset[str] | str:
            said = lines.append if number == 0 else lambda line: None
            has = memory(gib[number])
            try:
                ranks = Beside(number, 2)
                return chosen(config(), tmp_path, goes_on, has, ranks, said).model.checkpointed
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, range(2)))

    assert at(order, False) == [{"fake_score"}] * 2
    assert f"7.0 GiB of the device's {memory(9) / GIB:.1f}" in lines[0]
    assert at(order, True) == [{"fake_score"}] * 2
    refused = at((1, 100) if order[0] == 9 else (100, 1), True)
    assert all("run.replan=true" in str(one) for one in refused), refused


@pytest.mark.parametrize("size", mostly_long(["2", "auto"], "2"))
def test_a_run_of_auto_goes_on_bit_for_bit(tiny_pipeline: Tiny, tmp_path: Path, size: str) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    quiet = Console(quiet=True)

    def run(out: str, *more: str) -> dict[str, torch.Tensor]:
        values = [
            f"model.path={tiny_pipeline('sd35m')}", "model.resolution=64",
            "model.max_sequence_length=24", "model.gradient_checkpointing=auto",
            "train.batch_size=2", f"train.micro_batch_size={size}", "adapters.rank=4",
            f"data.prompts={tmp_path / 'prompts.txt'}", "data.cache=off", "run.device=cpu",
            f"run.out={tmp_path / out}", "cold_start.generator_every=2", "checkpoint.every=2",
            "log.samples_every=0", *more,
        ]  # fmt: skip
        run_training(load_config("sd35m_cold_start", values), quiet)
        tensors = load_checkpoint(tmp_path / out).tensors
        return {f"{k}/{n}": v for k, table in tensors.items() for n, v in table.items()}

    whole = run("whole", "train.steps=4")
    run("parts", "train.steps=2")
    plan = (tmp_path / "parts" / "plan.json").read_text()
    resumed = run("parts", "train.steps=4", "run.resume=true")
    assert (tmp_path / "parts" / "plan.json").read_text() == plan
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert "gradient_checkpointing: auto" in (tmp_path / "parts" / "config.yaml").read_text()


def of_samples(cfg: RunConfig) -> Plan:
    """A sample takes 1 GiB, and half of one where the fake score is recomputed."""
    each = 0.5 if "fake_score" in cfg.model.checkpointed else 1.0
    return Plan({"base weights": GIB}, {"iteration": int(each * cfg.train.micro * GIB)}, 0)


SIZE = "train.micro_batch_size=auto"


@pytest.mark.long
def test_samples_and_looks_take_as_many_rows_as_was_planned(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They took up to 64 at once, whatever the plan: the first sheet comes before a step."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\na cow\n")
    monkeypatch.setattr(planning, "Plans", fixed(of_samples))
    monkeypatch.setattr("tiltflow.tasks.train.device_bytes", lambda device: memory(2))
    seen: list[int] = []

    class Seen(FixedPrompts):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            seen.append(given[3])

    monkeypatch.setattr("tiltflow.tasks.train.FixedPrompts", Seen)
    values = [
        f"model.path={tiny_pipeline('sd35m')}", "model.resolution=64",
        "model.max_sequence_length=24", "model.gradient_checkpointing=false", SIZE,
        "train.batch_size=4", "adapters.rank=4", f"data.prompts={tmp_path / 'prompts.txt'}",
        "data.cache=off", "run.device=cpu", f"run.out={tmp_path / 'run'}", "train.steps=1",
        "log.samples_every=1", "watch.rewards={}",
    ]  # fmt: skip
    cfg = load_config("sd35m_cold_start", values)
    run_training(cfg, Console(quiet=True))
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["micro_batch_size"] == 1
    assert seen == [1]


def test_out_of_memory_advises_by_the_plan(tmp_path: Path) -> None:
    """And not by `auto`, which would have a run of 8 rows at a time try 32."""
    cfg = config(SIZE, "train.batch_size=64", f"run.out={tmp_path}")
    plan = {"gradient_checkpointing": ["fake_score"], "micro_batch_size": 8, "bytes": 1}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with (
        pytest.raises(MemoryError, match=r"micro_batch_size=4 \(now 8\), model.gradient_"),
        explained(cfg, 1),
    ):
        raise torch.OutOfMemoryError("too much")


def test_sizes_are_a_ranks_rows_and_their_parts() -> None:
    assert sizes(config(SIZE), 9) == [9, 5, 3, 2, 1]
    found = sizes(config(SIZE, "train.batch_size=96", "tilt.group_size=24", stage="tilt"), 96)
    assert found == [96, 48, 24, 12, 8, 6, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("gib", "size", "parts"),
    [
        (10.1, 9, ()),
        (9.9, 5, ()),  # two micro-batches cost less than recomputing
        (3.9, 2, ()),
        (2.9, 3, ("fake_score",)),  # nine cost more
        (2.1, 1, ()),
        (1.9, 1, ("fake_score",)),
    ],
)
def test_the_size_is_of_the_fastest_plan_that_fits(gib: float, size: int, parts: tuple) -> None:
    """Of stage 1 with 9 samples: 9 passes, 3 more where the fake score is recomputed, and a
    micro-batch costs a sample beyond its own."""
    cfg = sized(config(SIZE), memory(gib), 9, of_samples)
    assert cfg.train.micro_batch_size == size
    assert fastest(cfg, memory(gib), of_samples)[0] == parts


def test_a_size_by_itself_and_where_nothing_is_known() -> None:
    given = config(SIZE, "model.gradient_checkpointing=[fake_score]")
    cfg = sized(given, memory(4), 9, of_samples)
    assert cfg.train.micro == 5 and cfg.model.checkpointed == {"fake_score"}
    assert sized(config(SIZE), None, 9, of_samples).train.micro == 1
    assert sized(config(SIZE), memory(0.1), 9, of_samples).train.micro == 1
    assert sized(config(), memory(9), 9, of_samples) == config()
    mixture = load_config("mixture_cold_start", [SIZE, "run.out=x"])
    assert sized(mixture, memory(1), 64, of_samples).train.micro == 64


def test_a_run_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Plans", fixed(of_samples))
    said: list[str] = []

    def at(gib: float, goes_on: bool, *more: str) -> int:
        values = [SIZE, "model.gradient_checkpointing=false", *more]
        cfg = chosen(config(*values), tmp_path, goes_on, memory(gib), ALONE, said.append)
        assert not cfg.model.checkpointed
        return cfg.train.micro

    assert at(4.1, False) == 3
    assert said[0].startswith("micro_batch_size=auto is 3: 4.0 GiB of the device's ")
    assert json.loads((tmp_path / "plan.json").read_text())["micro_batch_size"] == 3
    assert at(100, True) == 3 and len(said) == 1
    with pytest.raises(ValueError, match=r"needs 4\.0 GiB and this device has .* run\.replan=true"):
        at(1, True)
    assert at(1.6, True, "run.replan=true") == 1
    assert said[1].startswith("planned anew: micro_batch_size=auto is 1: ")
    (tmp_path / "plan.json").write_text('{"gradient_checkpointing": [], "bytes": 1}')
    assert at(100, True) == 72  # it began with a size that was given: all rows now


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "stage", "more"),
    [
        ("sd3m", "tilt", ["tilt.reward_steps=2"]),
        ("sd3m", "tilt", ["tilt.keep_graph=true"]),
        ("klein", "cold_start", ["model.generator_path=null", "model.guidance=1.0"]),
        ("sd3m", "cold_start", ["cold_start.keep_graph=true", "cold_start.fresh_boundary=false"]),
        ("sd3m", "cold_start", ["adapters.kind=copies", "adapters.init_std=null"]),
    ],
)
def test_plans_of_variants_are_those_of_each_by_itself(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, stage: str, more: list[str]
) -> None:
    """Whatever was planned before, and in which order: what they share is made once."""
    recipe = {"sd3m": "sd3m", "klein": "flux2_klein_4b"}[name]
    values = [f"model.path={tiny_pipeline(name)}", "model.gradient_checkpointing=auto", *more]
    values += ["data.prompts=x", f"run.out={tmp_path}", "model.max_sequence_length=8"]
    values += ["train.batch_size=4", "train.micro_batch_size=2", "model.resolution=64"]
    if stage == "tilt":
        values += ["rewards={shapes_soft: 1.0}", "model.few_step=y", "tilt.group_size=2"]
    cfg = load_config(f"{recipe}_{stage}", values)
    parts = list(choices(cfg))
    assert len(parts) == (4 if stage == "cold_start" else 8)
    cases = [planning.with_checkpointing(cfg, each) for each in parts]
    plans = Plans(cfg)
    forth, back = [plans(case) for case in cases], [plans(case) for case in reversed(cases)]
    assert forth == back[::-1]
    assert forth == [plan_recipe(case) for case in cases]
    assert len({made.peak for made in forth}) > 1
