"""`tiltflow compare`: the systems of one evaluation, or of two on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tiltflow.core.paths import nearest
from tiltflow.core.sizes import parse_size, said, same_as
from tiltflow.evaluation.chunks import lasting
from tiltflow.evaluation.files import (
    evaluation_path,
    read_evaluation,
    read_scores,
    scores_path,
    write_evaluation,
)
from tiltflow.evaluation.measuring import DIVERSITY
from tiltflow.evaluation.scores import compare
from tiltflow.rewards.files import revised
from tiltflow.rewards.fitted import is_fitted
from tiltflow.rewards.fitting import may_read_metadata
from tiltflow.rewards.remote.address import REMOTE, column_of
from tiltflow.tasks.tables import show, show_comparisons, show_sizes

Columns = dict[str, NDArray[np.float64]]

NOISE = ("prompts", "seed", "resolution", "max_sequence_length")
"""What two evaluations have in common where their images come from the same noise."""


def run_compare(
    evaluations: Sequence[Path],
    systems: str | None,
    json_file: Path | None,
    console: Console,
    size: str | None = None,
) -> None:
    """Prints (and writes) `comparisons`; of one evaluation as it is, its table, too. `systems` is
    "A,B", `size` HEIGHTxWIDTH.

    Raises:
        ValueError: as `comparisons`, or if `systems` is no such pair.
    """
    pair = _pair(systems)
    if json_file is not None and json_file.exists() and not _is_comparisons(json_file):
        raise ValueError(
            f"{json_file} is there and holds no comparisons: give another name with --json"
        )
    rows = comparisons(evaluations, pair, None if size is None else said(parse_size(size)))
    if len(evaluations) == 1 and pair is None and size is None:
        summary = read_evaluation(evaluations[0])
        show(summary, console)
        show_sizes(summary, console)
    else:
        show_comparisons(rows, console)
    for sentence in (left_out(evaluations), other_noise(evaluations)):
        if sentence is not None:
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    if not rows:
        console.print("there is nothing to compare: the systems have equal scores, or are one")
    elif len(rows) > 1:
        console.print(
            f"p-values are corrected (Holm) for these {len(rows)} comparisons, and by them alone "
            "one is called higher or lower; the intervals are not corrected"
        )
    if json_file is not None:
        write_evaluation(json_file, {"comparisons": rows})


def _is_comparisons(path: Path) -> bool:
    """Whether a file is what `run_compare` writes."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(found, dict) and list(found) == ["comparisons"]


def comparisons(
    evaluations: Sequence[Path], pair: tuple[str, str] | None = None, size: str | None = None
) -> list[dict[str, Any]]:
    """The comparisons of one evaluation, or of two.

    One: those that it was made with, or the two systems `pair` of it, tested anew. Two: every
    system that is in both, or the first of `pair` in the first against the second in the second.
    Diversity of two feature spaces is left out (`left_out` says so).
    The p-values are corrected for the comparisons that come back, so name the pair that the
    question is about. Of evaluations over several sizes of pictures, a prompt's score is the mean
    over its sizes, or that at `size`.

    Raises:
        ValueError: if there are more than two, a system is in neither, the prompts or the sizes of
            two evaluations differ, a reward of both is not one and the same, one has not `size`,
            or an evaluation has no scores by prompt.
    """
    if not 1 <= len(evaluations) <= 2:
        raise ValueError(f"compare takes one or two evaluations, not {len(evaluations)}")
    summaries = [read_evaluation(path) for path in evaluations]
    if len(evaluations) == 2:
        _check_rewards(evaluations, summaries)
        without = [DIVERSITY] if other_features(*summaries) else []
        return _two(evaluations, pair, size, without)
    rows: list[dict[str, Any]] = summaries[0]["comparisons"]
    if pair is not None:
        return _compared(evaluations[0], [pair], size)
    if size is not None:
        return _compared(evaluations[0], [(row["a"], row["b"]) for row in rows], size)
    return rows


def _pair(systems: str | None) -> tuple[str, str] | None:
    if systems is None:
        return None
    names = [name.strip() for name in systems.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"--systems is {systems!r}; write two names, A,B")
    return names[0], names[1]


def _compared(
    path: Path, pairs: Sequence[tuple[str, str]], size: str | None
) -> list[dict[str, Any]]:
    stored = read_scores(scores_path(evaluation_path(path)), size)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    tables = {name: _measured(_column(stored.scores, name, path)) for name in names}
    return compare(tables, list(dict.fromkeys(pairs)), stored.prompts)


def _check_rewards(paths: Sequence[Path], summaries: Sequence[Mapping[str, Any]]) -> None:
    """That a reward that is in both evaluations is one and the same, and was asked the same.

    Raises:
        ValueError: naming the first that is not.
    """
    for name in other_rewards(*summaries):
        what = f"have the reward {name!r} with other {'code' if ':' in name else 'weights'}"
        if _revised(name, *summaries):
            what = f"are of versions of tiltflow in which the reward {name!r} scores otherwise"
        raise ValueError(f"{paths[0]} and {paths[1]} {what}, so its scores cannot be compared")
    for name in asked_otherwise(*summaries):
        raise ValueError(
            f"{paths[0]} and {paths[1]} have other metadata of their prompts, which the reward "
            f"{name!r} may read, so its scores cannot be compared"
        )


def other_rewards(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The columns of the rewards that are in both of two evaluations and had other weights or code
    in the second, as far as they say: files that hold something else, another hub id, or a reward
    server with others. Of an evaluation of an earlier version files of other names or sizes are
    others, and nothing is known of servers."""
    first, second = _rewards(one), _rewards(other)
    contents = [_content(summary, "rewards") for summary in (one, other)]
    found = []
    for name, like in _in_both(one, other):
        if name != like:
            changed: bool | None = _served_otherwise((name, like), contents)
        else:
            changed = _revised(name, one, other) or _changed(name, *contents)
        if changed is None:
            both = [lasting(table[name]) for table in (first, second)]
            # earlier versions did not look at one's own
            own = ":" in name or is_fitted(name)
            changed = both[0] != both[1] and not (own and None in both)
        if changed:
            found.append(_stands_as(name, one, other))
    return found


def _served_otherwise(names: tuple[str, str], contents: Sequence[Any]) -> bool:
    """Whether the servers of a reward at two addresses say that it is of other contents. Of one
    that computes here beside one elsewhere nothing is known: they say it in other words."""
    if not all(name.startswith(REMOTE) for name in names):
        return False
    said = [(of or {}).get(name) for name, of in zip(names, contents, strict=True)]
    return None not in said and said[0] != said[1]


def _in_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of the rewards of two evaluations whose scores stand in one column."""
    second = _rewards(other)
    there = {_stands_as(name, other): name for name in second}
    return [
        (name, name if name in second else there[column])
        for name, column in ((name, _stands_as(name, one)) for name in _rewards(one))
        if name in second or column in there
    ]


def _stands_as(name: str, *summaries: Mapping[str, Any]) -> str:
    """Where evaluations have the scores of a reward, by the first that says so. Earlier versions
    do not, and then a class of one's own is taken to be called as it was asked for."""
    said = ((summary.get("columns") or {}).get(name) for summary in summaries)
    return next((str(column) for column in said if column), column_of(name))


def _revised(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a builtin reward scored otherwise in one of two evaluations than in the other."""
    asked = [summary.get("asked") or {} for summary in (one, other)]
    of = [(each.get("revisions") or {}).get(name, 1) for each in asked]
    sizes = [asked[0].get("resolution"), *(size for size, _ in asked[0].get("sizes") or ())]
    oblong = any(isinstance(size, list | tuple) or "x" in str(size) for size in sizes)
    return revised(name, of[0], of[1], oblong)


def _changed(name: str, one: object, other: object) -> bool | None:
    """Whether what a reward's files hold is another in the second of two records, by its name and
    by those "NAME WHAT" beside it; None where one of them does not know its files."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return None
    if not (name in one and name in other):
        return None
    of = (key for key in one if key in other and (key == name or key.startswith(f"{name} ")))
    return any(one[key] != other[key] for key in of)


def asked_otherwise(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The columns of both of two evaluations whose scores may be of other metadata of the prompts:
    all that may read it, where the evaluations say that it is another. What earlier versions say is
    of the negative prompts, too."""
    said = [_content(summary, "prompts") for summary in (one, other)]
    if None in said:
        said = [(summary.get("asked") or {}).get("prompts") for summary in (one, other)]
    if None in said or said[0] == said[1]:
        return []
    return [
        _stands_as(name, one, other)
        for name, like in _in_both(one, other)
        if may_read_metadata(name) or may_read_metadata(like)
    ]


def _content(summary: Mapping[str, Any], what: str) -> Any:
    """What an evaluation says that files held; None of one of an earlier version."""
    return (summary.get("content") or {}).get(what)


def other_features(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two evaluations say that their diversities are of different features. One that does
    not say (an earlier version's) may be of the same."""
    both = [summary.get("diversity_in") for summary in (one, other)]
    return not (both[0] is None or both[1] is None) and not same_features(both[0], both[1])


def same_features(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two of `diversity_in` are one: by what the reward's files held, where both know it,
    else by the files' names and sizes."""
    name = one.get("reward")
    changed = _changed(str(name), one.get("content"), other.get("content"))
    if changed is not None and name == other.get("reward"):
        return not changed
    first, second = ({k: v for k, v in of.items() if k != "content"} for of in (one, other))
    return first == second


def other_columns(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The columns of scores that both evaluations may have and that are not to be compared."""
    rewards = dict.fromkeys([*other_rewards(one, other), *asked_otherwise(one, other)])
    return [*rewards, *([DIVERSITY] if other_features(one, other) else [])]


def own_columns(one: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> set[str]:
    """The columns of one evaluation that are not compared with those of the others' same name."""
    return {column for other in others for column in other_columns(one, other)}


def own_name(column: str, evaluation: str) -> str:
    """What a column is called that is an evaluation's own, beside others of the same name."""
    return f"{column}, {evaluation}"


def noise_of(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an evaluation says that its noise depends on; None of one that does not say."""
    asked = summary.get("asked")
    if not isinstance(asked, dict):
        return None
    several = {"sizes": asked["sizes"]} if "sizes" in asked else {}
    return {key: asked.get(key) for key in NOISE} | several


def other_noise(evaluations: Sequence[Path]) -> str | None:
    """The sentence that says that two evaluations started from different noise."""
    asked = [read_evaluation(path).get("asked") or {} for path in evaluations]
    sizes = [of.get("resolution") for of in asked if "sizes" not in of]  # several are named
    apart = []
    for what, found in (
        ("seeds", [of.get("seed") for of in asked]),
        ("sizes", [said(same_as(size)) for size in sizes if size is not None]),
    ):
        if len(found) == 2 and None not in found and found[0] != found[1]:
            apart.append(f"{what} {found[0]} and {found[1]}")
    if not apart:
        return None
    return (
        f"the images were made from different noise ({'; '.join(apart)}): the scores are paired by "
        "prompt alone"
    )


def left_out(evaluations: Sequence[Path]) -> str | None:
    """The sentence that says that diversity is not compared, and why; None where it is."""
    if len(evaluations) != 2:
        return None
    summaries = [read_evaluation(path) for path in evaluations]
    if not other_features(*summaries):
        return None
    return not_in_one([summary["diversity_in"] for summary in summaries])


def not_in_one(features: Sequence[Mapping[str, Any]]) -> str:
    """Why diversities that were measured in these features are not compared."""
    names = list(dict.fromkeys(str(of.get("reward") or of.get("medium")) for of in features))
    which = " and ".join(names) + ("" if len(names) > 1 else " with different weights")
    return f"diversity is not compared: it was measured in different features, those of {which}"


def _rewards(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rewards that an evaluation says it was asked for, with the place of their weights."""
    asked = summary.get("asked")
    found = asked.get("rewards") if isinstance(asked, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _two(
    paths: Sequence[Path],
    pair: tuple[str, str] | None,
    size: str | None,
    without: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Systems of two evaluations on all columns but those `without`; those of equal scores (one and
    the same teacher) are left out, for there is nothing to test."""
    first, second = (read_scores(scores_path(evaluation_path(path)), size) for path in paths)
    if first.prompts != second.prompts:
        raise ValueError(
            f"{paths[0]} and {paths[1]} are on different prompts, so there are no pairs to compare"
        )
    if first.sizes != second.sizes:
        raise ValueError(
            f"{paths[0]} and {paths[1]} are on different sizes of pictures: name one that both "
            "have with --size"
        )
    pairs = [pair] if pair else [(name, name) for name in first.scores if name in second.scores]
    if not pairs:
        raise ValueError(
            f"{paths[0]} and {paths[1]} have no system in common: name two with --systems A,B"
        )
    labels = _labels(paths)
    tables: dict[str, Columns] = {}
    named = []
    for a, b in pairs:
        one = _measured(_column(first.scores, a, paths[0]))
        other = _measured(_column(second.scores, b, paths[1]))
        shared = [reward for reward in one if reward in other and reward not in without]
        one, other = ({r: table[r] for r in shared} for table in (one, other))
        if all(np.array_equal(one[r], other[r]) for r in shared):
            continue
        named.append((f"{labels[0]}:{a}", f"{labels[1]}:{b}"))
        tables |= {named[-1][0]: one, named[-1][1]: other}
    return compare(tables, named, first.prompts)


def _column(scores: Mapping[str, Columns], name: str, path: Path) -> Columns:
    if name not in scores:
        raise ValueError(f"{path} has no system {name!r}{nearest(name, list(scores))}")
    return scores[name]


def _measured(columns: Columns) -> Columns:
    """Without the prompts at which a reward was not measured: the same ones for all systems of
    an evaluation, since they depend on the number of prompts alone."""
    return {reward: values[~np.isnan(values)] for reward, values in columns.items()}


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of two evaluations: what first differs in their paths, from the end."""
    parts = [evaluation_path(path).resolve().with_suffix("").parts for path in paths]
    for one, other in zip(*(reversed(p) for p in parts), strict=False):
        if one != other:
            return [one, other]
    return ["1", "2"]
