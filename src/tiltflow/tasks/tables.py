"""What the terminal shows of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tiltflow.evaluation.figures import around
from tiltflow.evaluation.report import beside
from tiltflow.evaluation.statistics import NO_DIFFERENCE, verdict


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The table of an evaluation, a column a system, and its comparisons, in the terminal."""
    systems = summary["systems"]
    table = Table(title=f"{summary['prompts']} prompts, mean ± half the 95% interval, or its ends")
    table.add_column("", no_wrap=True)
    for name in systems:
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("NFE", *(str(system["nfe"]) for system in systems.values()))
    for reward in next(iter(systems.values()))["scores"]:
        table.add_row(reward, *(_cell(s["scores"].get(reward)) for s in systems.values()))
    for name in beside(systems):
        table.add_row(name, *(_cell(system.get(name)) for system in systems.values()))
    console.print(table)
    show_comparisons(summary["comparisons"], console)


def show_categories(summary: Mapping[str, Any], console: Console) -> None:
    """For each reward, the means by category of prompt and their mean; nothing without any."""
    means = {s: figures.get("category_means", {}) for s, figures in summary["systems"].items()}
    _show_groups(summary.get("categories"), "category", console, means)


def show_sizes(summary: Mapping[str, Any], console: Console) -> None:
    """For each reward, the means by size of pictures; nothing where there is one alone."""
    _show_groups(summary.get("sizes"), "size", console)


def _show_groups(
    groups: Mapping[str, Any] | None,
    kind: str,
    console: Console,
    means: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    systems = next(iter(groups.values()))["systems"] if groups else {}
    for reward in next(iter(systems.values()), ()):
        table = Table(title=f"{reward} by {kind} (prompts)")
        table.add_column("system", no_wrap=True, min_width=14)
        for name, group in (groups or {}).items():
            table.add_column(f"{name} ({group['prompts']})", justify="right")
        if means:
            table.add_column("mean of categories", justify="right")
        for system in systems:
            of = [group["systems"][system][reward]["mean"] for group in (groups or {}).values()]
            own = [means[system][reward]] if means else []
            table.add_row(system, *(f"{mean:.4f}" for mean in [*of, *own]))
        console.print(table)


def show_comparisons(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Each comparison in a line, with its `verdict`."""
    for row in rows:
        found = verdict(row)
        said = found if found == NO_DIFFERENCE else f"{row['a']} is {found}"
        parts = [f"{row['difference']:+.4f} {_range(row['ci95'])}"]
        if "bootstrap_ci95" in row:
            parts.append(f"bootstrap {_range(row['bootstrap_ci95'])}")
        if "win_rate" in row:
            parts.append(f"wins {row['win_rate']:.0%} of {row['n']}")
        parts.append(f"p = {row['p_value']:.2g}")
        if "p_holm" in row:
            parts.append(f"corrected {row['p_holm']:.2g}")
        console.print(
            f"{row['a']} − {row['b']} on {row['reward']}: {', '.join(parts)}: {said}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _range(interval: Sequence[float]) -> str:
    return f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def _cell(score: Mapping[str, Any] | float | None) -> str:
    if score is None:
        return "–"
    if isinstance(score, float):
        return f"{score:.4f}"
    said = around(score["mean"], score["ci95"], 3)
    return f"{score['mean']:.3f} " + re.sub(r"(?<!\d)0\.", ".", said)  # four fit into 80 columns
