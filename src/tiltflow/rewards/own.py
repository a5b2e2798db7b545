"""Rewards of one's own as code: imported, and made, or told in one sentence why not."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tiltflow.core.allocation import out_of_memory
from tiltflow.core.paths import nearest
from tiltflow.core.sentences import first_sentence


def failure(error: BaseException) -> str:
    """An exception in a sentence: its type and what it says."""
    said = first_sentence(error)
    kind = type(error).__name__
    return kind if said == kind else f"{kind}: {said}"


def dotted(name: str) -> object:
    """What `package.module:name` is; the current directory is looked into as well.

    It is on the path of `python -m tiltflow`, and not on that of the command `tiltflow`.

    Raises:
        ValueError: if the module cannot be imported, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    module = imported(name, module_name, lambda: importlib.import_module(module_name))
    try:
        target: object = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(
            f"reward {name!r}: {module_name!r} has no {attribute!r}{nearest(attribute, public)}"
        ) from None
    return target


def imported(name: str, module: str, load: Callable[[], Any]) -> Any:
    """What `load` imports.

    Raises:
        ValueError: naming the reward, whatever the module raises or ends with.
    """
    start = f"reward {name!r}: cannot import {module!r}"
    try:
        return load()
    except ImportError as error:
        raise ValueError(f"{start}: {error}") from error
    except SyntaxError as error:
        place = f"{os.path.basename(error.filename or module)}, line {error.lineno}"
        raise ValueError(f"{start}: {error.msg} ({place})") from error
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{start}, which raised {failure(error)}") from error


def made(name: str, kind: type, **arguments: Any) -> Any:
    """An instance of a class of one's own.

    Raises:
        ValueError: naming the reward, whatever the constructor raises or ends with.
    """
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:  # such as arguments that it does not take
        raise ValueError(f"reward {name!r}: {first_sentence(error)}") from error
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"reward {name!r} cannot be made: {failure(error)}") from error
