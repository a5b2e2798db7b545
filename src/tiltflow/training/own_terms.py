"""Terms of stage 2 from outside: found by name, made, and held to their form.

What is amiss in somebody's own code is a sentence that names the term, never a number in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from tiltflow.training.optim import Updater
from tiltflow.training.own import Kind, arguments, guarded, trained_weights
from tiltflow.training.parts import Parts
from tiltflow.training.settings import Options
from tiltflow.training.terms import Attached, Epoch, Loss, Span, Term
from tiltflow.training.updates import Share

BUILTIN = {
    "awm": "tiltflow.training.forward_process:AWM",
    "gan": "tiltflow.training.adversarial:Adversary",
    "nft": "tiltflow.training.forward_process:NFT",
}
"""Terms that a recipe adds by name; those of METHOD §5 are always there, by their weights."""
TERMS = Kind("term", "tiltflow.terms", BUILTIN)


def make_terms(chosen: Mapping[str, Options], parts: Parts) -> list[Term]:
    """The terms of `tilt.terms`: of `BUILTIN`, entry points of `tiltflow.terms`, or
    `package.module:Class`; a class is called with the stage's parts and its options.

    Raises:
        ValueError: as `check_terms`, or what a constructor says.
    """
    check_terms(chosen)
    return [Held.of(TERMS.make(name, o, parts), name, parts) for name, o in chosen.items()]


def most_passes(chosen: Mapping[str, Options], steps: int) -> int:
    """The most passes that a span of these terms holds at once (`Term.passes`); 0 without any.

    Raises:
        ValueError: as `check_terms`, or naming a term whose `passes` gives no count.
    """
    return max((_passes(name, chosen[name], steps) for name in chosen), default=0)


def _passes(name: str, options: Options, steps: int) -> int:
    kind = _kind(name, options)
    with guarded(f"term {name!r}"):
        passes: object = kind.passes(steps, **arguments(kind, options))
    if not isinstance(passes, int) or passes < 0:
        raise ValueError(f"term {name!r}: passes() gives {passes!r}, which is no count")
    return passes


def check_terms(chosen: Mapping[str, Options]) -> None:
    """That there are such terms, and that they take these options.

    Raises:
        ValueError: if not.
    """
    for name, options in chosen.items():
        _kind(name, options)


def _kind(name: str, options: Options) -> type[Term]:
    kind = TERMS.check(name, options)
    if not issubclass(kind, Term):
        raise ValueError(f"term {name!r} does not derive from tiltflow.training.terms.Term")
    return kind


@dataclass(frozen=True, eq=False)
class Held(Term):
    """A term from outside among `steps` sampler steps: what it raises, gives and writes into.
    `trained` are the weights that others' losses train too.

    Raises:
        ValueError: naming the term. Running out of memory, being stopped, and numbers that are not
            finite pass as they are.
    """

    term: Term
    name: str
    steps: int
    trained: tuple[Tensor, ...]

    @staticmethod
    def of(term: object, called: str, parts: Parts) -> Held:
        """The term that a recipe calls so."""
        assert isinstance(term, Term)
        name = getattr(term, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"term {called!r} has no `name`, a text for what is said about it")
        return Held(term, name, parts.steps, trained_weights(parts))

    @property
    def takes_gradient(self) -> bool:  # type: ignore[override]
        with guarded(self.name):
            return bool(self.term.takes_gradient)

    @property
    def updaters(self) -> Mapping[str, Updater]:
        with guarded(self.name):
            return self.term.updaters

    def explores(self, step: int) -> tuple[int, ...]:
        with guarded(self.name):
            found = tuple(self.term.explores(step))
        if not all(_counts(k) and k < self.steps - 1 for k in found):
            raise ValueError(
                f"{self.name}: explores() gives {found}, but the stochastic steps are the whole "
                f"numbers from 0 to {self.steps - 2}"
            )
        return found

    def spans(self, step: int) -> tuple[Span, ...]:
        with guarded(self.name):
            found = tuple(self.term.spans(step))
        for span in found:
            if not isinstance(span, Span) or not (_counts(span.first) and _counts(span.stop)):
                raise ValueError(f"{self.name}: spans() gives {span!r} where a Span is needed")
            if not span.first <= span.stop <= self.steps:
                raise ValueError(
                    f"{self.name}: spans() gives {span}, but there are {self.steps} steps"
                )
        return tuple(dict.fromkeys(found))

    def begin(self, epoch: Epoch) -> Loss:
        with guarded(self.name, _tensors_of(epoch), self.trained):
            loss = self.term.begin(epoch)
        if not callable(loss):
            raise ValueError(f"{self.name}: begin() gives {loss!r}, which cannot be called")

        def held(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            given = [at.x, at.mean, at.std, *_tensors_of(epoch)]
            with guarded(self.name, given, self.trained):
                made: object = loss(at)
            return self._form(made, len(at.x))

        return held

    def _form(self, made: object, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the loss gave for n samples. A 0-d or detached loss would be broadcast over the
        samples, or train nothing, without a word."""
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], dict):
            losses, seen = made
            if (
                _one_each(losses, n)
                and losses.requires_grad
                and all(isinstance(key, str) and _one_each(v, n) for key, v in seen.items())
            ):
                return losses, {key: value.detach() for key, value in seen.items()}
        raise ValueError(
            f"{self.name}: a term's loss gives (losses, figures): a float tensor of ({n},) with a "
            "gradient, a loss for each sample, and a dict of such tensors, which need no gradient"
        )


class Figures:
    """What the terms log of an update, added up over its micro-batches.

    A name is one term's: a second one would replace the first's figures in the log, or be added
    to them.
    """

    def __init__(self, share: Share, taken: Iterable[str]) -> None:
        self.metrics: dict[str, Tensor] = {}
        self._share = share
        self._owners: dict[str, Term | None] = dict.fromkeys(("step", *taken))

    def add(self, term: Term, seen: Mapping[str, Tensor]) -> None:
        """Figures (b,) of a micro-batch.

        Raises:
            ValueError: if a name stands for something else.
        """
        for name in seen:
            if self._owners.setdefault(name, term) is not term:
                raise ValueError(f"{term.name}: its figure {name!r} has the name of another one")
        self._share.add(self.metrics, seen)


def _counts(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _one_each(values: object, n: int) -> bool:
    """Whether these are numbers of n samples."""
    return isinstance(values, Tensor) and values.shape == (n,) and values.is_floating_point()


def _tensors_of(epoch: Epoch) -> Iterator[Tensor]:
    """What all terms read of an epoch."""
    made, scored = epoch.trajectory, epoch.scored
    yield from (*made.states.values(), *made.log_probs.values(), made.sigmas, epoch.advantages)
    yield from scored.scores.values()
    yield from (tensor for tensor in (scored.losses, scored.gradient) if tensor is not None)
