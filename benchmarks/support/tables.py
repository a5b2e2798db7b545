"""How benchmarks measure and report: interleaved repetitions, medians, JSON and Markdown."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[2] / "docs" / "data"


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each of several runs, `rounds` times in turn, after one of each.

    In turn, because a machine's speed drifts: what is compared should meet the same weather. CPU
    seconds of this process, which a job beside it does not lengthen by what it takes for itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if number > 0:
                seconds[name].append(time.process_time() - began)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of what was measured in the same round."""
    return median([a / b for a, b in zip(above, below, strict=True)])


def machine() -> dict[str, Any]:
    """What a timing depends on and a reader has to know."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "bf16 instructions": torch.cpu._is_avx512_bf16_supported(),
    }


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def report(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], **more: Any
) -> None:
    """Prints a table and writes it, with the machine's facts, to docs/data/NAME.json."""
    print(markdown(columns, rows), flush=True)
    found = {
        "machine": machine(),
        "columns": list(columns),
        "rows": [list(r) for r in rows],
        **more,
    }
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
