"""Where things lie (`packaged:NAME` ships inside this package)."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path

PACKAGED = "packaged:"


def home_for_tilde(path: str) -> str:
    """`~` and `~user` at the start of a path as the home directory; any other path as it is.

    Raises:
        ValueError: if there is no such user: files would lie in a folder called `~…`.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no home directory of that user (./{path} is a folder)")
    return expanded


def resolve_path(path: str) -> str:
    """`packaged:NAME` as the path of `tiltflow/assets/NAME`; anything else (a local path, whose
    leading `~` is expanded, or a hub id) unchanged.

    Raises:
        ValueError: if the package has no asset of that name (names the nearest), or the user of a
            `~` no home.
    """
    if not path.startswith(PACKAGED):
        return home_for_tilde(path)
    name = path.removeprefix(PACKAGED)
    assets = Path(str(resources.files("tiltflow"))) / "assets"
    if name and ".." not in Path(name).parts and (assets / name).exists():
        return str(assets / name)
    present = sorted(p.name for p in assets.iterdir()) if assets.is_dir() else []
    raise ValueError(f"there is no packaged {name!r}{nearest(name, present)}")


def embedding_cache(setting: str | None) -> Path | None:
    """Where `data.cache` puts embeddings: a directory, the user's own (None), or nowhere ("off").

    The user's own is `embeddings` in `user_cache`.
    """
    if setting == "off":
        return None
    if setting is not None:
        return Path(home_for_tilde(setting))
    return user_cache() / "embeddings"


def user_cache() -> Path:
    """The user's own folder of what may be made again: `$TILTFLOW_CACHE`, else `tiltflow` in
    `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("TILTFLOW_CACHE")
    base = Path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base if own else base / "tiltflow"


def check_folder(key: str, folder: Path) -> None:
    """That a folder is there, or can be made, and may be written to; `key` is what asked for it.

    Raises:
        ValueError: naming the key, and the place that is in the way.
    """
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ValueError(f"{key} {folder} cannot be made: {error.strerror}") from error
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{key} {folder} cannot be made: {place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{key} {folder} cannot be made: {place} may not be written to")


def read_text(path: Path, name: str) -> str:
    """A text file's content, without a byte order mark; `name` names the file in errors.

    Raises:
        ValueError: if it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from error


def nearest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: what was perhaps meant, or what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(known)}" if known else "; there is none at all"


def misspelt(path: str) -> str:
    """The end of an error about a path where nothing is: what lies there under a name much alike,
    or nothing."""
    place = Path(home_for_tilde(path))
    for folder in place.parents:  # the first that is there: a folder's name may be the wrong one
        if folder.is_dir():
            wrong = place.relative_to(folder).parts[0]
            try:
                there = sorted(os.listdir(folder))
            except OSError:  # nobody may look
                return ""
            close = difflib.get_close_matches(wrong, there, n=1)
            rest = place.relative_to(folder / wrong)
            meant = [folder / name / rest for name in close if (folder / name / rest).exists()]
            return f"; did you mean {str(meant[0])!r}?" if meant else ""
    return ""
