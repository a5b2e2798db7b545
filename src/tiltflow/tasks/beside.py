"""Evaluations beside each other on one page: which of their columns and which images may be
compared, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltflow.evaluation.files import evaluation_path, read_scores, scores_path
from tiltflow.evaluation.measuring import DIVERSITY
from tiltflow.evaluation.report import BESIDE, beside
from tiltflow.tasks.compare import noise_of, own_columns, own_name

Table = Mapping[str, Any]
"""The content of an `evaluation.json`."""
Tables = Mapping[Path, Table]
Texts = Mapping[Path, tuple[str, ...] | None]
"""By evaluation, its prompts, as far as they are stored."""

NAMED = {
    "prompts": "prompts",
    "seed": "seeds",
    "resolution": "sizes",
    "sizes": "sizes",
    "max_sequence_length": "text lengths",
}
"""What the noise of an evaluation depends on (`noise_of`), in words."""


def stored_prompts(folder: Path) -> tuple[str, ...] | None:
    """The prompts of an evaluation; None where its scores by prompt are not beside it.

    Raises:
        ValueError: if these are no scores of an evaluation.
    """
    path = scores_path(evaluation_path(folder))
    return read_scores(path).prompts if path.is_file() else None


def told_apart(tables: Tables, texts: Texts, names: Mapping[Path, str]) -> dict[Path, Table]:
    """The evaluations with columns called "COLUMN, NAME" that are not to be compared with those of
    the same name in another: of a reward with other weights or other metadata, of diversity in
    other features, and every one where the prompts are others."""
    found = {}
    for folder, table in tables.items():
        own = own_columns(table, tables.values())
        if any(_other_prompts(folder, other, tables, texts) for other in tables):
            own |= _columns(table)
        elif DIVERSITY in own:
            own |= set(BESIDE)
        found[folder] = _renamed(table, {column: own_name(column, names[folder]) for column in own})
    return found


def one_noise(tables: Tables, texts: Texts) -> bool:
    """Whether all of them say that their images come from the same noise."""
    if len(tables) < 2:
        return True
    return None not in map(noise_of, tables.values()) and not _differing(tables, texts)


def notes_of(tables: Tables, texts: Texts) -> list[str]:
    """Sentences on what of these evaluations is not to be compared."""
    said = []
    if any(own_columns(table, tables.values()) for table in tables.values()):
        said.append(
            "A column with a run's name holds the scores of that run alone: those of the same name "
            "in another run are of other weights, metadata or features, and are not to be compared."
        )
    if any(_other_prompts(a, b, tables, texts) for a in tables for b in tables):
        said.append(
            "The runs were evaluated on different prompts, so each has columns of its own, and "
            "means of two of them are not to be compared."
        )
    if differing := _differing(tables, texts):
        said.append(
            f"The evaluations have different {' and '.join(differing)}, so images of two runs are "
            "not from the same noise."
        )
    return said


def _differing(tables: Tables, texts: Texts) -> list[str]:
    """In words, what the noise of the evaluations depends on and differs between them; of those
    that do not say, nothing is known."""
    asked = [noise for noise in map(noise_of, tables.values()) if noise is not None]
    found = [
        what
        for key, what in NAMED.items()
        if key != "prompts" and any(each.get(key) != asked[0].get(key) for each in asked)
    ]
    others = any(_other_prompts(a, b, tables, texts) for a in tables for b in tables)
    return list(dict.fromkeys([*([NAMED["prompts"]] if others else []), *found]))


def _other_prompts(one: Path, other: Path, tables: Tables, texts: Texts) -> bool:
    """Whether two evaluations are on other prompts: by these, where they are stored, else by their
    number and by what was asked."""
    stored = (texts[one], texts[other])
    if None not in stored:
        return stored[0] != stored[1]
    said = [(noise_of(tables[each]) or {}).get("prompts") for each in (one, other)]
    counts = [tables[each]["prompts"] for each in (one, other)]
    return counts[0] != counts[1] or (None not in said and said[0] != said[1])


def _columns(table: Table) -> set[str]:
    systems = table["systems"]
    return {r for system in systems.values() for r in system["scores"]} | set(beside(systems))


def _renamed(table: Table, names: Mapping[str, str]) -> Table:
    """An evaluation with these columns under other names, wherever it has them."""

    def of(columns: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(column, column): values for column, values in columns.items()}

    def system(values: dict[str, Any]) -> dict[str, Any]:
        inner = {k: of(values[k]) for k in ("scores", "category_means") if k in values}
        return {names.get(k, k) if k in BESIDE else k: v for k, v in (values | inner).items()}

    def group(values: Mapping[str, Any]) -> dict[str, Any]:
        return {**values, "systems": {s: of(scores) for s, scores in values["systems"].items()}}

    groups = ("categories", "sizes")
    return {
        **table,
        "systems": {name: system(values) for name, values in table["systems"].items()},
        "comparisons": [
            {**row, "reward": names.get(row["reward"], row["reward"])}
            for row in table["comparisons"]
        ],
        **{kind: {n: group(g) for n, g in table[kind].items()} for kind in groups if kind in table},
    }
