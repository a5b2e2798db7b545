"""docs/evidence.md: an estimator against the closed form that it stands in for, and its figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tiltflow.flow import interpolate
from tiltflow.models.families.mixture import ring

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATA = Path(__file__).parents[1] / "docs" / "data"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fake_score_error")


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.2), (0.0, 0.9), (0.5, 0.55), (0.5, 0.9)])
def test_the_velocity_of_samples_is_the_mixtures_within_its_stated_error(
    script: ModuleType, s: float, t: float
) -> None:
    """Samples of the mixture at level s in place of a student's: s of the noise's deviation from
    the step (std), none of it at s = 0."""
    mixture, generator = ring().to(torch.float64), torch.Generator().manual_seed(0)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    std = 0.8 * s
    x0 = mixture.sample(20_000, generator)
    means = (1 - s) * x0 + (s**2 - std**2) ** 0.5 * normal(len(x0))
    level = torch.full((64,), t, dtype=torch.float64)
    x_t = interpolate(mixture.sample(64, generator), normal(64), level)
    as_tensor = [torch.tensor(v, dtype=torch.float64) for v in (t, s, std)]
    found, variance = script.exact_velocity(x_t, *as_tensor[:2], means, as_tensor[2])
    error = (found - mixture.velocity(x_t, level)).square().sum(1).mean()
    size = mixture.velocity(x_t, level).square().sum(1).mean()
    assert 0 < error < 2 * variance.mean()
    assert variance.mean() < 0.01 * size


@pytest.mark.long
@pytest.mark.parametrize("name", ["fake_score_error", "tilted_target", "tilt_curve"])
def test_the_kept_cells_make_the_table_and_the_figure(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, kept = importlib.import_module(name), DATA / f"{name}.json"
    cells = script.Cells(kept, json.loads(kept.read_text())["settings"])
    names = [["rtdmd_2", "demo_tilt"]] if name == "tilt_curve" else []
    script.table(cells, *names)
    assert capsys.readouterr().out.count("\n|") > 8
    script.plot(cells, *names, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<path") > 20


@pytest.mark.long
def test_the_kept_cells_make_the_rows_of_the_planted_bias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained for them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, kept = importlib.import_module("planted_steps"), DATA / "planted_steps.json"
    cells = script.Cells(kept, {"count": 256})
    script.fill(cells, tmp_path / "runs", tmp_path / "none", 3, 256)
    script.table(cells)
    assert capsys.readouterr().out.count("\n|") == 17
    assert not (tmp_path / "runs").exists()
