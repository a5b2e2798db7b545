"""Terms and objectives from outside: found by name, their settings checked, made, and watched at
work."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic import BaseModel
from torch import Tensor

from tiltflow.core.allocation import out_of_memory
from tiltflow.core.errors import NonFiniteError, PeerLost
from tiltflow.core.interruption import Stopped
from tiltflow.core.registry import dotted, failure, find, made
from tiltflow.core.sentences import first_sentence
from tiltflow.core.settings import settled
from tiltflow.rewards.base import NonFiniteScore
from tiltflow.training.parts import Parts
from tiltflow.training.settings import Options


@dataclass(frozen=True)
class Kind:
    """What can be named in a recipe: "term" or "objective", its entry points, and the builtin ones
    by name with their places, which are imported when they are asked for."""

    what: str
    group: str
    builtin: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, options: Options) -> type:
        """The class of that name, which takes these options; nothing is made.

        Raises:
            ValueError: if there is none, it is no class, or it does not take the options.
        """
        if name in self.builtin:
            found = dotted(self.what, self.builtin[name])
        else:
            found = find(self.what, name, self.group, self.builtin, "Class")
        if not isinstance(found, type):
            raise ValueError(f"{self.what} {name!r} should be a class")
        try:
            inspect.signature(found).bind(parts=None, **arguments(found, options))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.what} {name!r}: {error}") from error
        return found

    def make(self, name: str, options: Options, parts: Parts) -> object:
        """An instance, called with the stage's parts and the options; a class with `Settings`, a
        pydantic model, has them checked by it and takes that as `settings`.

        Raises:
            ValueError: as `check`, or what the constructor says.
        """
        kind = self.check(name, options)
        return made(self.what, name, kind, parts=parts, **arguments(kind, options))


def arguments(kind: type, options: Options) -> Mapping[str, object]:
    """What a class is made with, beside the parts: its `Settings`, checked, or the options."""
    settings = getattr(kind, "Settings", None)
    if isinstance(settings, type) and issubclass(settings, BaseModel):
        return {"settings": settled(settings, options)}
    return options


def trained_weights(parts: Parts) -> tuple[Tensor, ...]:
    """The generator's and the fake score's, whose gradients are sums over what trains them."""
    roles = parts.roles
    return tuple(
        w for role in (roles.generator, roles.fake_score) for w in role.parameters.values()
    )


@contextmanager
def guarded(
    name: str, given: Iterable[Tensor] = (), trained: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Code from outside at work, on tensors that others read as well, beside weights that are
    `trained` by the sum of all terms.

    Raises:
        ValueError: naming it, if it raises anything, has written into what was `given` or is
            `trained`, or has given what is `trained` a gradient. Running out of memory, being
            stopped, a lost rank and numbers that are not finite pass as they are.
    """
    weights = list(trained)
    before = [(tensor, tensor._version) for tensor in (*given, *weights)]
    gradients = [(weight, weight.grad, _version(weight.grad)) for weight in weights]
    try:
        yield
    except (Stopped, PeerLost, NonFiniteError, NonFiniteScore):
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        what = first_sentence(error) if isinstance(error, ValueError) else failure(error)
        raise ValueError(f"{name}: {what}") from error
    if any(tensor._version != version for tensor, version in before):
        raise ValueError(
            f"{name}: it has written into a tensor that it was given, which others read after it: "
            "work on a copy"
        )
    if any(w.grad is not g or _version(w.grad) != version for w, g, version in gradients):
        raise ValueError(
            f"{name}: it has called backward, which adds to the gradient of the trained weights: "
            "give the loss, or take torch.autograd.grad"
        )


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor._version
