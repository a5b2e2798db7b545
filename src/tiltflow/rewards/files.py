"""What a reward's scores depend on, beside its name and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tiltflow.core.paths import resolve_path
from tiltflow.core.registry import source
from tiltflow.rewards.fitted import fitted_clip, fitted_folder, is_fitted
from tiltflow.rewards.remote.address import ELSEWHERE

REVISIONS = {"hpsv2": 3, "ocr": 2}
"""Of builtin rewards whose scores once were others: counted up with each such change, so that what
was scored before is not mixed in. `hpsv2` cut the ends off a picture that is not square (1), and
read typographic quotes, HTML entities and ligatures otherwise than its authors do (2). `ocr` took
a letter and its accent for two where the prompt has them as two characters (1)."""
OF_OBLONG = {("hpsv2", 2)}
"""The revisions that came with another score of pictures that are not square, and of no other."""


def revisions(names: Iterable[str]) -> dict[str, int]:
    """The revisions of those among these rewards that have one."""
    return {name: REVISIONS[name] for name in names if name in REVISIONS}


def revised(name: str, one: int, other: int, oblong: bool) -> bool:
    """Whether two revisions of a builtin reward may give an image two scores; `oblong` says whether
    the images are other than square."""
    between = range(min(one, other) + 1, max(one, other) + 1)
    return any(oblong or (name, revision) not in OF_OBLONG for revision in between)


def files_of(name: str, path: str | None) -> Path | None:
    """Its weights at `path`, which may be a hub id; the folder that it is itself; or the module of
    one's own code, without what that imports. None for a builtin one with its own weights, and for
    one elsewhere."""
    if path is not None:
        return Path(resolve_path(path))
    if is_fitted(name):
        return fitted_folder(name)
    return None if name.startswith(ELSEWHERE) else source(name)


def of_servers(rewards: Mapping[str, object], what: str) -> dict[str, str]:
    """What the servers of rewards say that these are made of, by the names that are given: their
    `contents`, or what of it is `lasting`. Nothing of rewards that compute here."""
    said = {name: getattr(reward, what, None) for name, reward in rewards.items()}
    return {name: of for name, of in said.items() if isinstance(of, str)}


def files_beside(name: str, path: str | None) -> dict[str, Path]:
    """What it depends on beside `files_of`, by "NAME WHAT": the CLIP under a fitted one, and the
    module of one's own code whose weights are at `path`. Nothing that is not on this machine."""
    found: dict[str, Path | None] = {}
    if path is None and is_fitted(name):
        clip = fitted_clip(fitted_folder(name))
        found[f"{name} clip"] = None if clip is None else Path(resolve_path(clip))
    if path is not None and not name.startswith(ELSEWHERE):
        found[f"{name} code"] = source(name)
    return {key: place for key, place in found.items() if place is not None and place.exists()}
