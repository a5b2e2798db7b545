"""Means, the JSONL file, and what a resumed run does to it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from short_runs import SHORT

import tiltflow
from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.disk import write_whole
from tiltflow.core.metrics import Accumulator, MetricsLog, read_metrics
from tiltflow.tasks.callbacks import SILENT


def test_means_are_over_the_calls_that_named_a_metric() -> None:
    sums = Accumulator()
    sums.add({"loss": torch.tensor(1.0), "lr": 0.5})
    sums.add({"loss": torch.tensor(2.0), "generator": torch.tensor(7.0, dtype=torch.bfloat16)})
    sums.add({"loss": torch.tensor(6.0), "lr": 0.25})
    assert sums.means() == {"loss": 3.0, "lr": 0.375, "generator": 7.0}
    sums.reset()
    assert sums.means() == {}


def test_adding_keeps_a_value_not_a_reference_or_a_graph() -> None:
    sums, value = Accumulator(), torch.tensor(1.0, requires_grad=True)
    sums.add({"a": value})
    with torch.no_grad():
        value.fill_(100.0)
    assert sums.means() == {"a": 1.0}
    assert not sums._sums["a"].requires_grad


def test_adding_does_not_wait_for_the_device() -> None:
    # A meta tensor has no value: anything that read it would raise.
    sums = Accumulator()
    for _ in range(2):
        sums.add({"a": torch.zeros((), device="meta")})
    assert sums._sums["a"].device.type == "meta"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_mean_is_an_error_with_its_name(bad: float) -> None:
    sums = Accumulator()
    sums.add({"fine": 1.0, "loss/policy": torch.tensor(bad)})
    with pytest.raises(FloatingPointError, match="'loss/policy'"):
        sums.means()


def test_a_metric_is_a_single_number() -> None:
    with pytest.raises(ValueError, match=r"'a' has shape \(1,\)"):
        Accumulator().add({"a": torch.zeros(1)})


def test_lines_have_step_first_and_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(10, {"loss": 0.5, "norm": torch.tensor(2.0)})
        assert path.read_text() == '{"step": 10, "loss": 0.5, "norm": 2.0}\n'
        log.write(20, {"loss": 0.25})
    assert read_metrics(path) == [
        {"step": 10, "loss": 0.5, "norm": 2.0},
        {"step": 20, "loss": 0.25},
    ]


def test_write_refuses_nan_and_a_second_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        with pytest.raises(FloatingPointError, match="'loss' is nan"):
            log.write(1, {"loss": float("nan")})
        with pytest.raises(ValueError, match="'step'"):
            log.write(1, {"step": 2.0})
    assert (tmp_path / "m.jsonl").read_text() == ""


@pytest.mark.parametrize(("resume_step", "kept"), [(20, [10, 20]), (None, [10, 20, 30]), (-1, [])])
def test_resume_drops_later_lines_and_a_torn_one(
    tmp_path: Path, resume_step: int | None, kept: list[int]
) -> None:
    path = tmp_path / "m.jsonl"
    lines = "".join(json.dumps({"step": s, "a": s / 2}) + "\n" for s in (10, 20, 30))
    path.write_text(lines + '{"step": 40, "a": 2')
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]
    with MetricsLog(path, resume_step=resume_step) as log:
        log.write(31, {"a": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [*kept, 31]
    assert list(tmp_path.iterdir()) == [path]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not a metrics line"):
        MetricsLog(path, resume_step=1)
    assert "hello" in path.read_text()
    with pytest.raises(ValueError, match="there is no metrics file"):
        read_metrics(tmp_path / "none.jsonl")


@pytest.mark.parametrize("end", ["[" * 100_000, "hello", '{"loss": 1.0}'])
def test_an_end_that_was_never_a_metrics_line_is_refused(tmp_path: Path, end: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + end)
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not a metrics line"):
        read_metrics(path)


@pytest.mark.parametrize("end", ["{", '{"st', '{"step": 2, "a"', "\0" * 9, '{"step": 2, "\0\0'])
def test_an_end_of_a_run_that_was_killed_is_left_out(tmp_path: Path, end: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + end)
    assert read_metrics(path) == [{"step": 1}]


def test_missing_sinks_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed \(pip install 'tiltflow"):
        MetricsLog(tmp_path / "m.jsonl", tensorboard=True)
    with pytest.raises(ValueError, match="wandb is not installed"):
        MetricsLog(tmp_path / "m.jsonl", wandb=True)


def test_sinks_get_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    run = SimpleNamespace(
        log=lambda row, step: seen.append((row, step)), finish=lambda: seen.append("finish")
    )
    board = SimpleNamespace(
        add_scalar=lambda *args: seen.append(args), flush=lambda: None, close=lambda: None
    )
    wandb = SimpleNamespace(init=lambda **settings: run)
    package = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    with MetricsLog(tmp_path / "m.jsonl", tensorboard=True, wandb=True) as log:
        log.write(3, {"a": torch.tensor(2.0)})
    assert seen == [("a", 2.0, 3), ({"a": 2.0}, 3), "finish"]


def test_tensorboard_file_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path / "m.jsonl", tensorboard=True) as log:
        log.write(3, {"a": 2.0})
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "[" * 100_000 + "]" * 100_000 + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: not a metrics line"):
        read_metrics(path)


def test_a_planted_link_in_the_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    (tmp_path / ".config.yaml.part").symlink_to(secret)
    write_whole(tmp_path / "config.yaml", "stage: tilt\n")
    assert secret.read_text() == "kept" and not (tmp_path / "config.yaml").is_symlink()
    assert (tmp_path / "config.yaml").read_text() == "stage: tilt\n"


def test_sums_go_on_from_what_was_kept_of_them() -> None:
    whole, first, second, other = (Accumulator() for _ in range(4))
    values = [{"a": 0.1, "b": 1.0}, {"a": 0.2}, {"a": 0.7, "c": torch.tensor(2.0)}]
    for value in values:
        whole.add(value)
    for value in values[:2]:
        first.add(value)
    second.load(json.loads(json.dumps(first.state())))
    second.add(values[2])
    assert second.means() == whole.means()
    other.load(first.state(), 1, 2)
    assert other.means() == {"a": 0.0, "b": 0.0}  # of another number of ranks the first has all
    kept = {"a": [0.25, 0.5, 2.0]}
    for rank, size, mean in ((0, 2, 0.125), (1, 2, 0.25), (0, 1, 0.375), (0, 3, 0.375), (2, 3, 0)):
        again = Accumulator()
        again.load(kept, rank, size)
        assert again.means() == {"a": mean}
    for bad in ({"a": 1.0}, {"a": [1.0]}, {"a": ["1", 2.0]}, {"a": [1.0, True]}):
        with pytest.raises(ValueError, match="the sum and count of metric 'a' are"):
            Accumulator().load(bad)  # type: ignore[arg-type]


class Killed(tiltflow.Callbacks):
    def checkpoint(self, step: int, path: Path) -> None:
        if step == 4:
            raise RuntimeError("killed")


def test_a_run_that_goes_on_between_two_lines_of_its_log_has_the_same_log(tmp_path: Path) -> None:
    def run(out: str, callbacks: tiltflow.Callbacks = SILENT, *more: str) -> str:
        chosen = [f"run.out={tmp_path / out}", *SHORT, "train.steps=6", "log.every=3", *more]
        tiltflow.train(load_config("mixture_cold_start", chosen), callbacks)
        return (tmp_path / out / "metrics.jsonl").read_text()

    with pytest.raises(RuntimeError, match="killed"):
        run("parts", Killed())
    assert run("parts", SILENT, "run.resume=true") == run("whole")
    kept = load_checkpoint(tmp_path / "parts", "step-000004").state["since_log"]
    assert kept and {count for _, count in kept.values()} == {1.0}


class Ended(tiltflow.Callbacks):
    """Ends the run at the first line of its log, before anything is saved."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        raise RuntimeError("killed")


def test_a_run_killed_on_a_branch_before_its_first_save_goes_on_on_that_branch(
    tmp_path: Path,
) -> None:
    """Its log has lost its later lines: the checkpoint of these is not the latest any more."""
    out, branch = tmp_path / "run", ("run.resume=true", "run.resume_from=step-000002")

    def run(callbacks: tiltflow.Callbacks, *more: str) -> None:
        chosen = [f"run.out={out}", *SHORT, "train.steps=4", "log.every=1", *more]
        tiltflow.train(load_config("mixture_cold_start", chosen), callbacks)

    run(SILENT)
    whole = (out / "metrics.jsonl").read_text()
    with pytest.raises(RuntimeError, match="killed"):
        run(Ended(), *branch)
    assert latest_step(out) == 2
    run(SILENT, "run.resume=true")
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "changed" not in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and latest_step(out) == 4
    assert whole.splitlines()[-1] in (out / "metrics.jsonl").read_text()
