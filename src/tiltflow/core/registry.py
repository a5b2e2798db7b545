"""What is found by name: builtin, registered by another package, or a dotted path to one's own
code; imported when it is asked for, or told in one sentence why not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from tiltflow.core.allocation import out_of_memory
from tiltflow.core.paths import nearest
from tiltflow.core.sentences import first_sentence


def failure(error: BaseException) -> str:
    """An exception in a sentence: its type and what it says."""
    said = first_sentence(error)
    kind = type(error).__name__
    return kind if said == kind else f"{kind}: {said}"


_REGISTERED: dict[tuple[str, str], EntryPoint] = {}


def register(kind: str, group: str, name: str, target: object) -> None:
    """Gives a name, in this process, to what lies at `package.module:name`, or to an object of a
    module (a function, a class), as an entry point of `group` would.

    Raises:
        ValueError: if the name is none, or stands for something else already; or if the object
            cannot be found again by its module and name.
    """
    if not name or ":" in name:
        raise ValueError(f"{name!r} is no name for a {kind}: it should be a word without a colon")
    place = target if isinstance(target, str) else _place(kind, name, target)
    if not re.fullmatch(r"[\w.]+:[\w.]+", place):
        raise ValueError(f"{kind} {name!r}: {place!r} should read 'package.module:name'")
    known = {point.name: point.value for point in entries(group)}
    if known.get(name, place) != place:
        raise ValueError(f"the {kind} {name!r} is registered already, as {known[name]}")
    _REGISTERED[group, name] = EntryPoint(name, place, group)


def _place(kind: str, name: str, target: object) -> str:
    module, inside = getattr(target, "__module__", None), getattr(target, "__qualname__", "<none>")
    if module is None or "<" in inside:
        raise ValueError(
            f"{kind} {name!r}: {target!r} has no place of its own in a module; define it there, or "
            "give the place as 'package.module:name'"
        )
    return f"{module}:{inside}"


def entries(group: str) -> list[EntryPoint]:
    """What other packages and this process have registered in a group."""
    here = [point for (of, _), point in _REGISTERED.items() if of == group]
    return [*entry_points(group=group), *here]


def find(kind: str, name: str, group: str, builtin: Iterable[str], own: str) -> object:
    """What a name that is not builtin stands for: `package.module:name` is itself; any other is an
    entry point of `group`, or registered here.

    Args:
        kind: "reward", "medium", …, for errors; `own` says what one of one's own is.

    Raises:
        ValueError: if there is none (names the nearest), or it cannot be imported.
    """
    if ":" in name:
        return dotted(kind, name)
    points: dict[str, EntryPoint] = {p.name: p for p in entries(group)}
    if name not in points:
        known, article = sorted({*builtin, *points}), "an" if kind[0] in "aeiou" else "a"
        raise ValueError(
            f"there is no {kind} {name!r}{nearest(name, known)} "
            f"({article} {kind} of your own is 'package.module:{own}')"
        )
    target: object = imported(kind, name, points[name].value, points[name].load)
    return target


def dotted(kind: str, name: str) -> object:
    """What `package.module:name` is; the current directory is looked into as well.

    It is on the path of `python -m tiltflow`, and not on that of the command `tiltflow`.

    Raises:
        ValueError: if the module cannot be imported, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    _look_here()
    module = imported(kind, name, module_name, lambda: importlib.import_module(module_name))
    try:
        target: object = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(
            f"{kind} {name!r}: {module_name!r} has no {attribute!r}{nearest(attribute, public)}"
        ) from None
    return target


def source(name: str) -> Path | None:
    """The file of the module of `package.module:name`; None where there is no such file. Nothing
    but the packages around the module is imported."""
    module, colon, _ = name.partition(":")
    _look_here()
    try:
        spec = importlib.util.find_spec(module) if colon else None
    except (ImportError, ValueError, AttributeError):  # said when it is imported
        return None
    found = None if spec is None or spec.origin is None else Path(spec.origin)
    return found if found is not None and found.is_file() else None


def _look_here() -> None:
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)


def imported(kind: str, name: str, module: str, load: Callable[[], Any]) -> Any:
    """What `load` imports.

    Raises:
        ValueError: naming what was to be imported, whatever the module raises or ends with.
    """
    start = f"{kind} {name!r}: cannot import {module!r}"
    try:
        with torch_as_it_was():
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


def made(kind: str, name: str, target: type, **arguments: Any) -> Any:
    """An instance of a class of one's own.

    Raises:
        ValueError: naming it, whatever the constructor raises or ends with.
    """
    try:
        with torch_as_it_was():
            return target(**arguments)
    except (TypeError, ValueError) as error:  # such as arguments that it does not take
        raise ValueError(f"{kind} {name!r}: {first_sentence(error)}") from error
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{kind} {name!r} cannot be made: {failure(error)}") from error


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Puts back what holds for the whole process, and some libraries set as they are imported: the
    default type, whether gradients are kept, the precision of fp32 products (TF32). A reward would
    have the training itself computed in another way, without a word."""
    dtype, grad, precision = torch.get_default_dtype(), torch.is_grad_enabled(), _precision()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if precision is not None and _precision() not in (None, precision):
            torch.set_float32_matmul_precision(precision)


def _precision() -> str | None:
    """None where it was set by a backend's `fp32_precision`: torch refuses to say it then."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
