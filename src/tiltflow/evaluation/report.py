"""One HTML page that a run leaves behind: what came out, how sure it is, and how it looks.

The page is a single file that works offline: images are inlined, figures are SVG, nothing is
fetched and nothing runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from tiltflow.core.disk import write_whole
from tiltflow.evaluation.charts import curves as drawn_curves
from tiltflow.evaluation.charts import forests, side_by_side
from tiltflow.evaluation.figures import decimals, number
from tiltflow.evaluation.pictures import Sheet, grid, progress
from tiltflow.evaluation.seeds import caveat, named
from tiltflow.evaluation.statistics import NO_DIFFERENCE, SIGNIFICANT, verdict
from tiltflow.evaluation.watch_figures import Watched, alarms, watch_charts

Tables = list[tuple[str, list[tuple[str, list[str]]]]]
"""By reward, rows of a system and its cells."""
MAIN_CURVES = 6  # a stage; the others are folded away

# What the columns are, for the rewards that come with the package.
MEASURES = {
    "shapes": "share of images that show exactly what the prompt describes, by the exact checker",
    "shapes_soft": "share of the prompt's description that holds, by the exact checker",
    "clipscore": "cosine similarity of image and prompt under CLIP",
    "clipscore_heldout": "cosine similarity under a second CLIP, kept apart from training",
    "diversity": "mean cosine distance between images of one prompt; higher is more varied",
    "linear": "the first coordinate",
    "vendi": "effective number of different images of one prompt (Vendi score)",
    "cmmd": "distance of the images, as a set, to the teacher's (CMMD); 0 for the same set",
}
SYSTEMS = {
    "teacher": "the base model itself, in many steps with guidance",
    "teacher_N_step": "the base model in as few steps as the students have",
    "ac_dmd": "stage 1: the student, distilled to a few steps",
    "rtdmd": "stage 2: the student of stage 1, tilted to the rewards",
    "merged": "a student whose few-step weights are merged into the pipeline",
}
"""What the systems of `tiltflow evaluate` are."""
BESIDE = ("vendi", "cmmd")
"""Figures of a system that are shown beside its rewards and not compared."""


@dataclass(frozen=True)
class Verdict:
    """A comparison in words, and the figures it rests on."""

    a: str
    b: str
    reward: str
    words: str
    significant: bool
    difference: str
    interval: str
    p_value: str
    seeds: str = ""
    """Of runs of several seeds: those that both have."""


def write_report(
    out: str | Path,
    *,
    title: str,
    evaluation: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    grids: Mapping[str, Sequence[NDArray[np.uint8]]],
    prompts: Sequence[str],
    config: Mapping[str, str],
    versions: Mapping[str, str],
    watch: Mapping[str, Watched] | None = None,
    sheets: Sequence[Sheet] = (),
    together: Sequence[Sequence[str]] = (),
    notice: str = "",
) -> Path:
    """Write `report.html` into a directory (or to a path that ends in .html); gives its path.

    Args:
        evaluation: the content of `evaluation.json`; without systems, that part is left out. Of
            several, `one_noise` is whether their images come from the same noise, `notes` are
            sentences on what is not to be compared, and a column that is one run's own is called
            "REWARD, RUN".
        curves: by stage, the rows of its `metrics.jsonl`.
        grids: by system, images (H, W, 3) uint8 of `prompts`, or videos' frames, in order and from
            the same noise.
        prompts: one caption a row of the grid; rows beyond the shortest system are left out.
        config: by stage, the resolved configuration's text.
        versions: of what the run ran on, by name.
        watch: by stage, what its watch saw.
        sheets: samples during training; those of one run in order.
        together: groups of stages whose curves are also drawn in common frames.
        notice: a sentence above everything else.

    Raises:
        ValueError: as `grid`.
    """
    out = Path(out)
    path = out if out.suffix == ".html" else out / "report.html"
    samples, whole = progress(sheets)
    page = _template().render(
        title=title,
        notice=notice,
        **_results(evaluation),
        stages={stage: drawn_curves(stage, rows) for stage, rows in curves.items()},
        together=[c for g in together for c in side_by_side({s: curves[s] for s in g})],
        watch=watch or {},
        alarms=alarms(watch or {}),
        watch_charts=watch_charts(watch or {}),
        samples=samples,
        sheets=whole,
        main_curves=MAIN_CURVES,
        grid_systems=list(grids),
        grid=grid(grids, prompts),
        config=config,
        versions=versions,
        number=number,
    )
    write_whole(path, page)
    return path


def beside(systems: Mapping[str, Any]) -> list[str]:
    """Those of `BESIDE` that some system of an evaluation has, runs' own among them."""
    names = dict.fromkeys(name for system in systems.values() for name in system)
    return [name for of in BESIDE for name in names if name.partition(", ")[0] == of]


def _results(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of an evaluation."""
    systems, comparisons = evaluation.get("systems", {}), evaluation.get("comparisons", [])
    rewards = list(dict.fromkeys(r for s in systems.values() for r in s["scores"]))
    columns = {r: MEASURES.get(r.partition(", ")[0]) for r in [*rewards, *beside(systems)]}
    return {
        "evaluation": evaluation,
        "systems": systems,
        "one_noise": evaluation.get("one_noise", True),
        "notes": evaluation.get("notes", []),
        "rewards": rewards,
        "measures": {column: what for column, what in columns.items() if what is not None},
        "beside": beside(systems),
        "explained": _explained(evaluation),
        "categories": _categories(evaluation),
        "sizes": _sizes(evaluation),
        "best": _best(systems, comparisons),
        "digits": _digits(systems),
        "forests": forests(evaluation) if systems else [],
        "verdicts": _by_pair([_verdict(c) for c in comparisons]),
        "adjusted": any("p_holm" in c for c in comparisons),
    }


def _template() -> Any:
    source = resources.files("tiltflow.evaluation").joinpath("report.html.j2")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source.read_text(encoding="utf-8"))


def _explained(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What each system is, where it is one of `SYSTEMS`; of several evaluations on one page, a
    system is called "SYSTEM, RUN"."""
    asked, found = evaluation.get("asked") or {}, {}
    for system in evaluation.get("systems", {}):
        name = re.sub(r"teacher_\d+_step", "teacher_N_step", system.partition(", ")[0])
        if name in SYSTEMS:
            steps = asked.get("teacher_steps" if name == "teacher" else "steps")
            strength = asked.get({"rtdmd": "tilt", "merged": "merged"}.get(name, ""))
            found[system] = SYSTEMS[name]
            found[system] += "" if steps is None else f" ({steps} steps)"
            found[system] += "" if strength in (None, 1) else f", at the strength {strength:g}"
    return found


def _best(systems: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By reward, the system with the highest mean, if it was compared and every comparison of it
    found it higher."""
    best: dict[str, str] = {}
    for reward in dict.fromkeys(r for s in systems.values() for r in s["scores"]):
        means = {
            n: s["scores"][reward]["mean"] for n, s in systems.items() if reward in s["scores"]
        }
        leader = max(means, key=lambda name: means[name])
        rows = [c for c in comparisons if c["reward"] == reward and leader in (c["a"], c["b"])]
        ahead = [verdict(c) == ("higher" if c["a"] == leader else "lower") for c in rows]
        if ahead and all(ahead):
            best[reward] = leader
    return best


def _by_pair(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], list[Verdict]]:
    pairs: dict[tuple[str, str], list[Verdict]] = {}
    for found in verdicts:
        pairs.setdefault((found.a, found.b), []).append(found)
    return pairs


def _digits(systems: Mapping[str, Any]) -> dict[str, int]:
    """By reward, the digits after the point that its intervals warrant."""
    intervals: dict[str, list[Sequence[float]]] = {}
    for system in systems.values():
        for reward, score in system["scores"].items():
            intervals.setdefault(reward, []).append(score["ci95"])
    return {reward: decimals(found) for reward, found in intervals.items()}


def _categories(evaluation: Mapping[str, Any]) -> Tables:
    """By reward, a row a system: its means in each category, and over the categories; "" where it
    was not measured."""
    found = evaluation.get("categories", {})
    means = {s: v.get("category_means", {}) for s, v in evaluation.get("systems", {}).items()}
    tables = _groups(found, means)
    return [
        (reward, [(s, [*cells, _cell(means[s].get(reward))]) for s, cells in rows])
        for reward, rows in tables
    ]


def _sizes(evaluation: Mapping[str, Any]) -> Tables:
    """By reward, a row a system: its means at each size of pictures; "" where it was not
    measured."""
    found = evaluation.get("sizes", {})
    measured: dict[str, dict[str, None]] = {}
    for group in found.values():
        for system, table in group["systems"].items():
            measured.setdefault(system, {}).update(dict.fromkeys(table))
    return _groups(found, measured)


def _groups(found: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> Tables:
    tables = []
    for reward in dict.fromkeys(name for table in measured.values() for name in table):
        rows = [
            (
                system,
                [
                    _cell(c["systems"].get(system, {}).get(reward, {}).get("mean"))
                    for c in found.values()
                ],
            )
            for system in measured
        ]
        tables.append((reward, rows))
    return tables if found else []


def _cell(mean: float | None) -> str:
    return "" if mean is None else number(mean, 3)


def p_text(p: float) -> str:
    """A p-value for readers: 'p < 0.001', 'p = 0.004', 'p = 0.21'."""
    if p < 0.001:
        return "p < 0.001"
    if 0.0495 <= p < SIGNIFICANT:
        return f"p = {p:.4f}"  # '0.050' would look as though it were not significant
    return f"p = {p:.3f}" if p < 0.095 else f"p = {p:.2f}"


def _verdict(comparison: Mapping[str, Any]) -> Verdict:
    difference, found = comparison["difference"], verdict(comparison)
    digits = decimals([comparison["ci95"]])
    low, high = (number(v, digits) for v in comparison["ci95"])
    size = number(abs(difference), digits)
    return Verdict(
        a=comparison["a"],
        b=comparison["b"],
        reward=comparison["reward"],
        words=found if found == NO_DIFFERENCE else f"{found} by {size}{caveat(comparison)}",
        significant=found != NO_DIFFERENCE,
        difference=size if difference == 0 else ("+" if difference > 0 else "−") + size,
        interval=f"{low} to {high}",
        p_value=p_text(comparison.get("p_holm", comparison["p_value"])),
        seeds=named(comparison["seeds"]) if "seeds" in comparison else "",
    )
