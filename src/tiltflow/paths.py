"""Where things lie (`packaged:NAME` ships inside this package)."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path

PACKAGED = "packaged:"


def resolve_path(path: str) -> str:
    """`packaged:NAME` as the path of `tiltflow/assets/NAME`; anything else (a local path, whose
    leading `~` is expanded, or a hub id) unchanged.

    Raises:
        ValueError: if the package has no asset of that name; names the nearest.
    """
    if not path.startswith(PACKAGED):
        return os.path.expanduser(path)
    name = path.removeprefix(PACKAGED)
    assets = Path(str(resources.files("tiltflow"))) / "assets"
    if name and ".." not in Path(name).parts and (assets / name).exists():
        return str(assets / name)
    present = sorted(p.name for p in assets.iterdir()) if assets.is_dir() else []
    raise ValueError(f"there is no packaged {name!r}{nearest(name, present)}")


def embedding_cache(setting: str | None) -> Path | None:
    """Where `data.cache` puts embeddings: a directory, the user's own (None), or nowhere ("off").

    The user's own is `embeddings` in `$TILTFLOW_CACHE`, else in `$XDG_CACHE_HOME/tiltflow`, else
    in `~/.cache/tiltflow`.
    """
    if setting == "off":
        return None
    if setting is not None:
        return Path(setting).expanduser()
    own = os.environ.get("TILTFLOW_CACHE")
    base = Path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (base if own else base / "tiltflow") / "embeddings"


def nearest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: what was perhaps meant, or what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(known)}" if known else "; there is none at all"
