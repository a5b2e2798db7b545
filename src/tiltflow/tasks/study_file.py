"""The file of a study (`tiltflow study`): rows of settings, seeds, budgets, and what is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tiltflow.config.recipe_source import parse_yaml
from tiltflow.core.limits import LARGEST_SEED
from tiltflow.core.paths import nearest, read_text
from tiltflow.core.settings import (
    Count,
    Images,
    Place,
    Positive,
    Samples,
    Section,
    Steps,
    Text,
    settled,
)
from tiltflow.data.columns import Columns, columns_of
from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.rewards.files import revisions
from tiltflow.setup.manifest import prompts_fingerprint, rewards_fingerprints

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Scored = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(@[1-9][0-9]*)?$")]
"""A row, or where the study has several numbers of sampler steps ROW@K, it in K of them."""
Changes = dict[Text, Any]
"""Settings by dotted key."""


class Row(Section):
    """A recipe with settings changed. `like`: an earlier row, whose recipe, start and settings it
    has where it has none of its own. `start`: the row whose run of the same seed a stage-2 row
    starts from. `seeds` and `budget`: its own, where they are others than the study's and the
    stage's."""

    like: Name | None = None
    recipe: Text = ""
    set: Changes = Field(default_factory=dict)
    start: Name | None = None
    seeds: Seeds | None = None
    budget: Positive | None = None


class StageOf(Section):
    """What a study's rows of one stage have in common: the network evaluations, forward and
    backward, that each cell has (they settle `train.steps`), and settings."""

    budget: Positive
    set: Changes = Field(default_factory=dict)


class Study(Section):
    """A study's file.

    `set` are settings of all rows, and come before those of the stage and the row. `prompts`
    (those from number `first` on, `count` of them), `noise` and `rewards` are what every cell is
    scored on; `steps`: at each of these numbers of sampler steps, else at that of the student.
    `compare`: pairs of rows (a − b), or of ROW@K; by default every row with `reference`. `curves`:
    figures of the log for the page.
    """

    rows: Annotated[dict[Name, Row], Field(min_length=1)]
    seeds: Seeds
    stages: dict[Literal["cold_start", "tilt"], StageOf]
    set: Changes = Field(default_factory=dict)
    prompts: Place
    split: Text | None = None
    columns: Columns = Columns()
    first: Count = 0
    count: Annotated[Images, Field(ge=2)] = 256
    noise: Seed = 0
    rewards: Annotated[tuple[Text, ...], Field(min_length=1)]
    diversity: bool = False
    steps: tuple[Steps, ...] = ()
    batch: Samples = 64
    reference: Name
    compare: tuple[tuple[Scored, Scored], ...] = ()
    curves: tuple[Text, ...] = ()

    def seeds_of(self, row: str) -> tuple[int, ...]:
        return self.rows[row].seeds or self.seeds

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is compared: rows, or with `steps` rows in K of them, each with the other's K where
        a pair does not say which."""
        others = [(name, self.reference) for name in self.rows if name != self.reference]
        ends = [f"@{k}" for k in self.steps] or [""]
        found = []
        for a, b in self.compare or others:
            at = [""] if "@" in a + b else ends
            found += [(f"{a}{end}", f"{b}{end}") for end in at]
        return found

    def scored(self) -> list[Prompt]:
        """The prompts that every cell is scored on, `chosen` ones.

        Raises:
            ValueError: if the set has fewer.
        """
        return self.chosen

    @cached_property
    def content(self) -> dict[str, Any]:
        """What the prompts and the files of the rewards hold that `prompts` and `rewards` name, and
        the revisions of builtin rewards.

        Raises:
            ValueError: as `scored`.
        """
        revised = revisions(self.rewards)
        return {
            "prompts": prompts_fingerprint(self.chosen),
            "rewards": rewards_fingerprints(dict.fromkeys(self.rewards)),
            **({"revisions": revised} if revised else {}),
        }

    @cached_property
    def chosen(self) -> list[Prompt]:
        """Read once: a file that is replaced while the study runs leaves its cells those prompts
        that their results say.

        Raises:
            ValueError: if the set has fewer.
        """
        columns = columns_of(self.columns.model_dump(exclude_none=True))
        whole = load_prompts(self.prompts, self.split, columns)
        found = whole[self.first : self.first + self.count]
        if len(found) < self.count:
            raise ValueError(
                f"study: {self.prompts} has {len(found)} prompts from number {self.first} on, "
                f"not {self.count}"
            )
        return found


def load_study(path: Path) -> Study:
    """A study's file, checked, but for what each row's settings say.

    Raises:
        ValueError: in one sentence, the first thing that is wrong.
    """
    raw = parse_yaml(read_text(path, str(path)), str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no study: it should be a mapping of keys to values")
    try:
        study = settled(Study, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    study = study.model_copy(update={"rows": _whole(study.rows, path)})
    for what, values in _lists(study):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            which = _shown(twice[0])
            raise ValueError(f"{path}: {what} has {which} twice, which would count as two")
    for what, name in _named(study):
        if name not in study.rows:
            raise ValueError(f"{path}: {what} {name!r} is no row{nearest(name, list(study.rows))}")
    for name in (name for pair in study.compare for name in pair if "@" in name):
        if int(name.partition("@")[2]) not in study.steps:
            raise ValueError(f"{path}: compare {name!r} is at none of the study's steps")
    for name, row in study.rows.items():
        if row.start is None:
            continue
        if study.rows[row.start].start is not None:
            raise ValueError(f"{path}: row {name!r} starts from {row.start!r}, which starts itself")
        lacking = [s for s in study.seeds_of(name) if s not in study.seeds_of(row.start)]
        if lacking:
            raise ValueError(
                f"{path}: row {name!r} has the seed {lacking[0]}, but {row.start!r}, which it "
                "starts from, has not"
            )
    return study


def _whole(rows: dict[str, Row], path: Path) -> dict[str, Row]:
    """The rows, each with what it has from the row that it is like.

    Raises:
        ValueError: if that is no row before it, or a row has no recipe.
    """
    found: dict[str, Row] = {}
    for name, row in rows.items():
        if row.like is not None:
            if row.like not in found:
                raise ValueError(f"{path}: row {name!r} is like {row.like!r}, no row before it")
            model = found[row.like]
            has = {"recipe": row.recipe or model.recipe, "start": row.start or model.start}
            row = row.model_copy(update={**has, "set": model.set | row.set})
        if not row.recipe:
            raise ValueError(f"{path}: row {name!r} has no recipe")
        found[name] = row
    return found


def _lists(study: Study) -> Iterator[tuple[str, Sequence[object]]]:
    """What stands in a study once: figures of one thing given twice are no two measurements, and
    p-values are corrected for how many comparisons there are."""
    yield "seeds", study.seeds
    yield from (("seeds", row.seeds) for row in study.rows.values() if row.seeds is not None)
    yield "steps", study.steps
    yield "rewards", study.rewards
    yield "compare", study.compare


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _named(study: Study) -> Iterator[tuple[str, str]]:
    yield "reference", study.reference
    yield from (("compare", name.partition("@")[0]) for pair in study.compare for name in pair)
    yield from (("start", row.start) for row in study.rows.values() if row.start is not None)
