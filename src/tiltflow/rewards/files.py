"""Which files on this machine a reward's scores depend on, beside its name and its settings."""

from __future__ import annotations

from pathlib import Path

from tiltflow.core.paths import resolve_path
from tiltflow.core.registry import source
from tiltflow.rewards.fitted import fitted_folder, is_fitted
from tiltflow.rewards.remote.address import ELSEWHERE


def files_of(name: str, path: str | None) -> Path | None:
    """Its weights at `path`, which may be a hub id; the folder that it is itself; or the module of
    one's own code, without what that imports. None for a builtin one with its own weights, and for
    one elsewhere."""
    if path is not None:
        return Path(resolve_path(path))
    if is_fitted(name):
        return fitted_folder(name)
    return None if name.startswith(ELSEWHERE) else source(name)
