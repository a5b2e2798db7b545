"""examples/two_stages.py: it fits a page, it learns, its figures are those of the documents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[1] / "examples" / "two_stages.py"


@pytest.fixture
def example() -> ModuleType:
    """The module as it is before its first update; it seeds torch itself."""
    spec = importlib.util.spec_from_file_location("two_stages", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_fits_a_page() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 130


def test_a_short_run_goes_the_right_way(example: ModuleType) -> None:
    seen = example.main(iterations=300, epochs=15)
    (start, _, _), (matched, before, _), (tilted, after, _) = seen.values()
    assert matched > start + 0.1
    assert after > before + 0.02
    assert tilted > start + 0.1


@pytest.mark.long
def test_the_whole_run_has_the_figures_that_documents_name(example: ModuleType) -> None:
    seen = example.main()
    assert seen["start"][0] == pytest.approx(0.27, abs=0.02)
    assert seen["stage 1"][0] == pytest.approx(0.89, abs=0.02)
    assert seen["stage 1"][1] == pytest.approx(0.0, abs=0.05)
    assert seen["stage 2"][0] == pytest.approx(0.89, abs=0.02)
    assert seen["stage 2"][1] == pytest.approx(0.42, abs=0.05)
