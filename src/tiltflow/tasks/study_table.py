"""What a study came to: one table as text, Markdown and JSON, and a page with curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tiltflow.config.load import dump_config
from tiltflow.core.disk import write_whole
from tiltflow.core.metrics import read_metrics
from tiltflow.evaluation.figures import around
from tiltflow.evaluation.measuring import DIVERSITY
from tiltflow.evaluation.report import write_report
from tiltflow.evaluation.scores import texts_of
from tiltflow.evaluation.seeds import caveat, compared, named, over_seeds
from tiltflow.evaluation.statistics import NO_DIFFERENCE, mean_ci
from tiltflow.evaluation.statistics import verdict as verdict_over_prompts
from tiltflow.setup.costing import Cost
from tiltflow.tasks.compare import not_in_one, same_features
from tiltflow.tasks.doctor import versions
from tiltflow.tasks.study import Cell, cells_of
from tiltflow.tasks.study_file import Study

AGREE = 0.02
"""The share by which the network evaluations of a stage's cells may differ."""


def summarise(study: Study, out: Path) -> dict[str, Any]:
    """The cells that are done, in the form of an `evaluation.json` with more in it.

    Raises:
        ValueError: if none is done, a result is of other settings, or two are of servers of one
            reward with other contents.
    """
    done = [found for cell in cells_of(study, out) if (found := cell.result())]
    if not done:
        raise ValueError(f"{out} has no finished cell of this study")
    systems: dict[str, list[dict[str, Any]]] = {}
    for name, found in (each for result in done for each in _at_steps(result)):
        systems.setdefault(name, []).append(found)
    _check_servers(systems)
    apart = _features_apart(systems)
    if apart:
        systems = {name: [*map(_without_diversity, found)] for name, found in systems.items()}
    scores: dict[str, dict[str, dict[int, Any]]] = {}
    for name, results in systems.items():
        for found in results:
            for reward, values in found["scores"].items():
                by_seed = scores.setdefault(name, {}).setdefault(reward, {})
                by_seed[found["seed"]] = np.asarray(values)
    of = partial(texts_of, [prompt.text for prompt in study.scored()])
    pairs = [pair for pair in study.pairs if all(name in scores for name in pair)]
    return {
        "prompts": study.count,
        "cells": {"done": len(done), "of": len(cells_of(study, out))},
        "systems": {name: _system(found, scores[name], of) for name, found in systems.items()},
        "comparisons": compared(scores, pairs, of),
        "budgets": budgets(done),
        **({"left_out": apart} if apart else {}),
    }


def _features_apart(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Why diversity is left out: two results say that theirs is of different features."""
    said: list[Mapping[str, Any]] = []
    for result in (found for results in systems.values() for found in results):
        of = result.get("diversity_in")  # earlier versions did not say
        if of is not None and not any(same_features(of, one) for one in said):
            said.append(of)
    return not_in_one(said) if len(said) > 1 else None


def _check_servers(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """That what a server says its reward is made of is the same in all results that know it.

    Raises:
        ValueError: naming the reward, and two cells.
    """
    seen: dict[str, tuple[str, str]] = {}
    for result in (found for results in systems.values() for found in results):
        cell = f"{result['row']}, seed {result['seed']}"
        for reward, contents in result.get("servers", {}).items():
            known, first = seen.setdefault(reward, (contents, cell))
            if known != contents:
                raise ValueError(
                    f"the server of {reward!r} had other contents when it scored {cell} than for "
                    f"{first}, so their scores cannot be compared: remove one of the two results"
                )


def _without_diversity(result: Mapping[str, Any]) -> dict[str, Any]:
    scores = {reward: v for reward, v in result["scores"].items() if reward != DIVERSITY}
    return {**result, "vendi": None, "scores": scores}


def _at_steps(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A cell's result under its row's name; of one that was scored at several numbers of steps,
    that at each K under ROW@K."""
    if "at" not in result:
        return [(result["row"], result)]
    return [(f"{result['row']}@{k}", result | found) for k, found in result["at"].items()]


def _system(
    found: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[int, Any]],
    of: Callable[[int], Sequence[str]],
) -> dict[str, Any]:
    system: dict[str, Any] = {
        "nfe": found[0]["nfe"],
        "stage": found[0]["stage"],
        "seeds": [result["seed"] for result in found],
        "steps": [result["steps"] for result in found],
        "cost": [result["cost"] for result in found],
        "scores": {
            reward: over_seeds(values, of(len(next(iter(values.values())))))
            for reward, values in scores.items()
        },
    }
    vendi = [result["vendi"]["mean"] for result in found if result["vendi"] is not None]
    if vendi:
        seeds = list(mean_ci(vendi)[1:]) if len(vendi) > 1 else found[0]["vendi"]["ci95"]
        system["vendi"] = {"mean": float(np.mean(vendi)), "ci95": seeds}
    return system


def budgets(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By stage and budget, the least and the greatest network evaluations of a cell, by what share
    of the greatest they differ, and whether that is within `AGREE`."""
    found: dict[str, dict[str, Any]] = {}
    counted: dict[str, list[int]] = {}
    for result in results:
        of = _budget_of(result, results)
        counted.setdefault(of, []).append(Cost(**result["cost"]).evaluations)
    for of, counts in counted.items():
        spread = 1 - min(counts) / max(counts)
        found[of] = {
            "least": min(counts),
            "most": max(counts),
            "spread": spread,
            "agree": spread <= AGREE,
        }
    return found


def _budget_of(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """A result's stage, and its budget where rows of the stage have several."""
    stage = str(result["stage"])
    given = {r.get("asked", {}).get("budget") for r in results if r["stage"] == stage}
    return stage if len(given) == 1 else f"{stage} at {result['asked']['budget']:,}"


def budget_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line a budget, and first why diversity is left out, where it is."""
    lines = [summary["left_out"]] if "left_out" in summary else []
    for stage, found in summary["budgets"].items():
        verdict = "agree within" if found["agree"] else "DIFFER BY MORE THAN"
        lines.append(
            f"network evaluations of {stage}: {found['least']:,} to {found['most']:,}, which "
            f"{verdict} {AGREE:.0%} ({found['spread']:.2%})"
        )
    return lines


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """The main table: its head, and a line a row of the study."""
    systems = summary["systems"]
    rewards = list(dict.fromkeys(r for s in systems.values() for r in s["scores"]))
    beside = ["vendi"] if any("vendi" in s for s in systems.values()) else []
    lines = [["row", "seeds", "iterations", "evaluations", "reward calls", *rewards, *beside]]
    for name, system in systems.items():
        costs = [Cost(**cost) for cost in system["cost"]]
        line = [name, str(len(system["seeds"])), _range(system["steps"])]
        line += [_range([c.evaluations for c in costs]), _range([c.scored for c in costs])]
        line += [_cell(system["scores"].get(reward)) for reward in rewards]
        line += [f"{system['vendi']['mean']:.3f}" if "vendi" in system else "–"] * len(beside)
        lines.append(line)
    return lines


def comparison_lines(summary: Mapping[str, Any]) -> list[str]:
    """Each comparison: the seeds that both rows have, the difference on these, its intervals, its
    corrected p-value, and a verdict."""
    return [
        f"{row['a']} − {row['b']} on {row['reward']} ({named(row['seeds'])}): "
        f"{row['difference']:+.4f}, {_interval(row['ci95'])} over prompts, "
        f"{_interval(row['seeds_ci95'])} over seeds, p = {row['p_holm']:.2g}: {verdict(row)}"
        for row in summary["comparisons"]
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """The verdict over prompts, and whether the seeds' own interval has 0 in it."""
    words = verdict_over_prompts(row)
    return words if words == NO_DIFFERENCE else words + caveat(row)


SEEDS = (
    "A mean is over the row's own seeds; a comparison is on the seeds that both rows have, so it "
    "need not be the difference of their means."
)
NOTE = (
    f"Means ± half the 95% interval (or its ends) over prompts / over seeds. {SEEDS} p is "
    "over prompts, corrected (Holm) for all comparisons here. An evaluation is one sample through "
    "a network, forward or backward."
)


def markdown(summary: Mapping[str, Any]) -> str:
    """The table, the comparisons and the budgets."""
    parts = [_markdown(table(summary)), NOTE, *budget_lines(summary)]
    if summary["comparisons"]:
        parts.append("\n".join(f"- {line}" for line in comparison_lines(summary)))
    return "\n\n".join(parts) + "\n"


def write_study(study: Study, out: Path, summary: Mapping[str, Any]) -> list[Path]:
    """`study.json`, `study.md` and `study.html` in `out`."""
    write_whole(out / "study.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_whole(out / "study.md", markdown(summary))
    systems = {name.partition("@")[0]: system for name, system in summary["systems"].items()}
    curves: dict[str, list[dict[str, float]]] = {}
    stages: dict[str, list[str]] = {}
    for row, system in systems.items():
        seeds, rows = _curves(study, out, row)
        if rows:
            name = f"{row} ({named(seeds)})"
            curves[name] = rows
            stages.setdefault(system["stage"], []).append(name)
    first = {row: Cell(study, out, row, system["seeds"][0]) for row, system in systems.items()}
    page = write_report(
        out / "study.html",
        title=f"tiltflow study: {out.name}",
        evaluation=summary,
        curves=curves,
        grids={},
        prompts=[],
        config={row: dump_config(cell.config) for row, cell in first.items()},
        versions=versions(),
        together=list(stages.values()),
        notice=". ".join([*budget_lines(summary), SEEDS]),
    )
    return [out / "study.json", out / "study.md", page]


def _curves(study: Study, out: Path, row: str) -> tuple[list[int], list[dict[str, float]]]:
    """The seeds whose logs are there, and the chosen figures of these: the mean over the seeds at
    the steps that all have. None of them where the results are kept and the runs are not."""
    logs: list[dict[int, dict[str, float]]] = []
    seeds: list[int] = []
    for cell in cells_of(study, out, [row]):
        if cell.result() is not None and cell.run.is_dir():
            lines: dict[int, dict[str, float]] = {}
            for line in read_metrics(cell.run / "metrics.jsonl"):
                kept = {k: line[k] for k in study.curves if isinstance(line.get(k), float)}
                lines.setdefault(line["step"], {}).update(kept)
            logs.append(lines)
            seeds.append(cell.seed)
    common = [s for s in sorted(logs[0]) if all(s in log for log in logs)] if logs else []
    rows = []
    for step in common:
        names = [k for k in study.curves if all(k in log[step] for log in logs)]
        means = {k: float(np.mean([log[step][k] for log in logs])) for k in names}
        if means:
            rows.append({"step": step, **means})
    return seeds, rows


def show_study(summary: Mapping[str, Any], console: Console) -> None:
    """The table, the comparisons and the budgets in the terminal."""
    cells = summary["cells"]
    console.print(f"{cells['done']} of {cells['of']} cells, {summary['prompts']} prompts")
    console.print(_rich(table(summary)))
    console.print(NOTE)
    for line in (*comparison_lines(summary), *budget_lines(summary)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _rich(lines: Sequence[Sequence[str]]) -> Table:
    made = Table()
    for number, name in enumerate(lines[0]):
        made.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for line in lines[1:]:
        made.add_row(*line)
    return made


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    over_prompts = around(score["mean"], score["ci95"], 3, sign="± ")
    return f"{score['mean']:.3f} {over_prompts} / {_half(score['seeds_ci95'])}"


def _half(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{(interval[1] - interval[0]) / 2:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
