"""Blind votes: which of two systems' images one likes better, and what the votes say so far."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tiltflow.core.disk import sha256
from tiltflow.data.preferences import append_vote, read_votes
from tiltflow.desk.sets import Column, Table
from tiltflow.evaluation.anytime import win_rate_interval

OPEN = 4096
"""Pairs on show that are remembered: an older one cannot be voted on any more."""


@dataclass(frozen=True)
class Match:
    """What is voted on: two systems of a set, by their names there."""

    set: str
    a: str
    b: str


@dataclass(frozen=True)
class Pair:
    """One prompt's two images as they are shown; `digests` are what they are."""

    match: Match
    row: int
    prompt: str
    left: Column
    right: Column
    digests: tuple[str | None, str | None]

    def image(self, side: str) -> Path:
        """Raises KeyError if there is no such side."""
        return {"left": self.left, "right": self.right}[side].image(self.row)


class Ballot:
    """Votes in a file, which several browsers and desks may write to at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._pairs: OrderedDict[str, Pair] = OrderedDict()
        self._lock = threading.Lock()
        self._read: tuple[object, list[dict[str, Any]]] = (None, [])

    def draw(self, match: Match, table: Table) -> dict[str, Any]:
        """A new pair to look at: a prompt that has been voted on least, sides by lot. What is
        answered does not tell which system is on which side.

        Raises:
            ValueError: if the systems are not two of the set's, or no image of both was kept.
        """
        columns = [table.column(match.a), table.column(match.b)]
        if match.a == match.b:
            raise ValueError("a vote is between two systems, not one and itself")
        with self._lock:
            row = self._row(match, columns, len(table.prompts))
            left, right = columns if secrets.randbits(1) else columns[::-1]
            digests = (_digest(left.image(row)), _digest(right.image(row)))
            pair = Pair(match, row, table.prompts[row], left, right, digests)
            key = secrets.token_hex(8)
            self._pairs[key] = pair
            while len(self._pairs) > OPEN:
                self._pairs.popitem(last=False)
        return {"pair": key, "prompt": pair.prompt, "tally": self.tally(match, columns)}

    def _row(self, match: Match, columns: list[Column], n: int) -> int:
        shown = Counter(vote.row for vote in self._votes(match, columns)[0])
        shown.update(pair.row for pair in self._pairs.values() if pair.match == match)
        names = [_names(column.images) for column in columns]
        kept = [r for r in range(n) if all(f"{r:05d}.png" in files for files in names)]
        if not kept:
            raise ValueError("no images of these systems were kept: evaluate with --keep-images")
        fewest = min(shown[row] for row in kept)
        return secrets.choice([row for row in kept if shown[row] == fewest])

    def image(self, key: str, side: str) -> Path:
        """Raises KeyError if there is no such pair or side."""
        return self._pairs[key].image(side)

    def vote(self, key: str, choice: str) -> Match:
        """Writes down which side was chosen: left, right or tie. A pair is voted on once.

        Raises:
            ValueError: if the choice is none of these, the pair is not on show (any more), or its
                images are others than those that were shown.
        """
        if choice not in ("left", "right", "tie"):
            raise ValueError("a choice is left, right or tie")
        with self._lock:
            pair = self._pairs.get(key)
            if pair is None:
                raise ValueError("this pair has been voted on, or was shown too long ago")
            left, right = pair.image("left"), pair.image("right")
            if (_digest(left), _digest(right)) != pair.digests:
                del self._pairs[key]
                raise ValueError("the images of this pair have been made anew: no vote is kept")
            append_vote(
                self.file,
                {
                    "prompt": pair.prompt,
                    "image_a": self._place(left),
                    "image_b": self._place(right),
                    "choice": {"left": "a", "right": "b", "tie": "tie"}[choice],
                    "system_a": pair.left.name,
                    "system_b": pair.right.name,
                    "row": pair.row,
                    "set": pair.match.set,
                    "time": round(time.time(), 3),
                    "sha256_a": pair.digests[0],
                    "sha256_b": pair.digests[1],
                },
            )
            del self._pairs[key]  # only now: a failed write leaves the pair to be voted on again
        return pair.match

    def _place(self, image: Path) -> str:
        """An image's path from the folder of the votes."""
        return Path(os.path.relpath(image.resolve(), self.file.resolve().parent)).as_posix()

    def tally(self, match: Match, columns: list[Column]) -> dict[str, Any]:
        """Wins, losses and ties of the match's first system, its win rate (a tie is half a win)
        and the interval, which holds however often one looks; and how many votes were on images
        that are not there any more, which are not counted."""
        counted, other = self._votes(match, columns)
        results = Counter(vote.result for vote in counted)
        wins, losses, ties = results["win"], results["loss"], results["tie"]
        votes = wins + losses + ties
        low, high = win_rate_interval(wins + ties / 2, losses + ties / 2)
        return {
            "wins": wins,
            "losses": losses,
            "ties": ties,
            "rate": (wins + ties / 2) / votes if votes else None,
            "interval": [low, high],
            "other": other,
        }

    def _votes(self, match: Match, columns: list[Column]) -> tuple[list[Counted], int]:
        """The votes of a match, whichever side its systems were on: those on the images that these
        have now, and how many others. Trained or sampled anew, a system keeps its name and is
        another one; beside another evaluation, it has another name and is the same one."""
        file = self.file
        mark = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
        if mark != self._read[0]:
            self._read = (mark, read_votes(file))
        places = [self._place(column.images) for column in columns]
        counted, other = [], 0
        for vote in self._read[1]:
            if vote.get("set") != match.set or not isinstance(vote.get("row"), int):
                continue
            sides = [_system(vote, side, columns, places) for side in "ab"]
            if {system for system, _ in sides} != {0, 1}:
                continue
            if all(current for _, current in sides):
                counted.append(Counted(vote["row"], _result(vote["choice"], sides[0][0] == 0)))
            else:
                other += 1
        return counted, other


@dataclass(frozen=True)
class Counted:
    """A vote on a prompt: whether the match's first system won, lost or neither."""

    row: int
    result: str


def _names(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _system(
    vote: Mapping[str, Any], side: str, columns: Sequence[Column], places: Sequence[str]
) -> tuple[int | None, bool]:
    """Which of two systems a vote's side was, None for neither, and whether it has that image now,
    as far as the vote says. Its name is not enough: "rtdmd" is "rtdmd, RUN" as soon as another
    evaluation stands beside it. So it is also the one whose image lies there, or is the same."""
    row, said = vote["row"], vote.get(f"sha256_{side}")
    named = [
        k
        for k, (column, place) in enumerate(zip(columns, places, strict=True))
        if vote[f"image_{side}"] == f"{place}/{row:05d}.png"
        or vote.get(f"system_{side}") == column.name
    ]
    if said is None:
        return (named[0] if named else None), True
    same = [k for k, column in enumerate(columns) if _digest(column.image(row)) == said]
    both = [k for k in named if k in same] or (same if len(same) == 1 else [])
    return next(iter(both or named), None), bool(both)


def _digest(image: Path) -> str | None:
    """What an image is, None where there is none."""
    try:
        about = image.stat()
        return _hashed(image, about.st_mtime_ns, about.st_size)
    except OSError:
        return None


@lru_cache(maxsize=65_536)
def _hashed(file: Path, changed: int, size: int) -> str:
    return sha256(file)


def _result(choice: str, first_is_a: bool) -> str:
    if choice == "tie":
        return "tie"
    return "win" if (choice == "a") == first_is_a else "loss"
